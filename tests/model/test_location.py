"""Location decoder and masks from attention maps: exact values, invariances, forms that training and export need."""

import pytest
import torch
import torch.nn.functional as F

from hf_maskformer.model.attention_masks import (
    AttentionMaskBlock,
    AttentionMaskDecoder,
    MasksOfScores,
    logits_of_values,
    raise_resolution,
)
from hf_maskformer.model.initialization import initialize
from hf_maskformer.model.query_decoder_location import IMPOSSIBLE, LocationQueryDecoder

SHAPES = ((8, 12), (4, 6), (2, 3), (1, 2))


def decoder(channels=(16, 16, 16, 16), dtype=torch.float64, **overrides) -> LocationQueryDecoder:
    torch.manual_seed(0)
    settings = {
        "dim": 16,
        "layers": 2,
        "heads": 4,
        "ffn_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation": "relu",
        "points": 2,
        "num_thing_queries": 5,
        "num_labels": 4,
        "thing_label_ids": [1, 3],
        "thing_mask_layers": 2,
        "stuff_mask_layers": 3,
    }
    built = LocationQueryDecoder(list(channels), **{**settings, **overrides})
    built.apply(initialize)
    built.reset_published()
    return built.eval().to(dtype)


def memory_of(images: int = 2, channels=(16, 16, 16, 16), dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = zip(channels, SHAPES, strict=True)
    return [torch.randn(images, width, *shape, generator=generator).to(dtype) for width, shape in sizes]


def padding_of(heights: list[int], widths: list[int], size=(64, 96)) -> torch.Tensor:
    padding = torch.ones(len(heights), *size, dtype=torch.bool)
    for row, height, width in zip(padding, heights, widths, strict=True):
        row[:height, :width] = False
    return padding


def run(model, memory, padding=None, all_layers=False, **options):
    return model(memory, None, padding, class_head=None, mask_head=None, all_layers=all_layers, **options)


# --- masks of attention maps -----------------------------------------------------------------------------------------


def test_masks_are_weighed_sums_of_the_maps_by_hand():
    masks = MasksOfScores(levels=2, heads=1)
    with torch.no_grad():
        masks.by_level[0].weight.fill_(2.0)
        masks.by_level[0].bias.fill_(0.5)
        masks.by_level[1].weight.fill_(1.0)
        masks.by_level[1].bias.fill_(-1.0)
        masks.fuse.weight.copy_(torch.tensor([1.0, 0.5]).view(1, 2, 1, 1))
        masks.fuse.bias.fill_(-1.0)
    scores = torch.tensor([1.0, -1.0, 2.0, -0.25, 2.5]).view(1, 1, 1, 5)  # 2 x 2, then 1 x 1
    # level 0: relu(2 s + 0.5) = 2.5, 0, 4.5, 0; level 1: relu(s - 1) = 1.5; relu(level 0 + 0.75 - 1)
    values = masks(scores, ((2, 2), (1, 1)), None)
    assert values.tolist() == [[[[2.25, 0.0], [4.25, 0.0]]]]


def direct_masks(module: MasksOfScores, scores, shapes):
    """The published order: all heads' maps are upsampled, concatenated, then weighed."""
    maps, start = [], 0
    for (height, width), linear in zip(shapes, module.by_level, strict=True):
        part = scores[..., start : start + height * width].permute(0, 2, 3, 1)  # (B, Q, cells, heads)
        part = F.relu(F.linear(part, linear.weight[:, :, 0, 0], linear.bias)).permute(0, 1, 3, 2)
        part = part.reshape(-1, part.shape[2], height, width)
        part = F.interpolate(part, size=shapes[0], mode="bilinear")
        maps.append(part.view(*scores.shape[:1], scores.shape[2], -1, *shapes[0]))
        start += height * width
    joined = torch.cat(maps, 2).movedim(2, -1)  # (B, Q, h, w, levels * heads)
    return F.relu(F.linear(joined, module.fuse.weight[:, :, 0, 0], module.fuse.bias))[..., 0]


def test_weighing_before_upsampling_gives_the_published_numbers():
    torch.manual_seed(0)
    module, shapes = MasksOfScores(levels=3, heads=4).double(), SHAPES[:3]
    scores = torch.randn(2, 4, 5, sum(h * w for h, w in shapes), dtype=torch.float64)
    values = module(scores, shapes, None)
    assert values.shape == (2, 5, 8, 12)
    assert (values > 0).any()
    assert torch.allclose(values, direct_masks(module, scores, shapes), atol=1e-12)


def test_a_block_is_attention_and_feed_forward_by_the_formula():
    torch.manual_seed(0)
    shapes = SHAPES[:2]
    block = AttentionMaskBlock(8, levels=2, heads=2, ffn_dim=12, self_attention=False).double().eval()
    states, positions = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    memory = torch.randn(1, 8 * 12 + 4 * 6, 8, dtype=torch.float64)
    cross, (x,) = block.cross_attention, states + positions
    query, key, value = cross.query(x), cross.key(memory[0]), cross.value(memory[0])
    heads = [slice(0, 4), slice(4, 8)]
    scores = torch.stack([query[:, head] @ key[:, head].T / 2 for head in heads])  # sqrt(4) = 2
    attended = torch.cat([score.softmax(-1) @ value[:, head] for score, head in zip(scores, heads, strict=True)], -1)
    x = block.cross_attention_norm(x + cross.output(attended))
    x = block.feed_forward_norm(x + block.feed_forward.contract(F.gelu(block.feed_forward.expand(x))))
    out, values, weights = block(states, positions, memory, shapes, None, True, True)
    assert torch.allclose(out[0], x, atol=1e-12)
    assert torch.allclose(values, direct_masks(block.masks, scores[None], shapes), atol=1e-12)
    assert torch.allclose(weights[0], scores.softmax(-1), atol=1e-12)
    fast, none, _ = block(states, positions, memory, shapes, None, False, False)
    assert none is None
    assert torch.allclose(fast, out, atol=1e-12)


def test_a_padded_image_gets_the_masks_of_the_unpadded_one():
    torch.manual_seed(0)
    shapes, small = ((8, 8), (4, 4), (2, 2)), ((8, 4), (4, 2), (2, 1))
    masks = AttentionMaskDecoder(8, levels=3, blocks=2, heads=2, ffn_dim=16, self_attention=True).double().eval()
    maps = [torch.randn(1, 8, *shape, dtype=torch.float64) for shape in shapes]
    padding = torch.cat([(torch.arange(w) >= w // 2).expand(h, w).flatten() for h, w in shapes])[None]
    queries = torch.randn(1, 3, 8, dtype=torch.float64)

    def flat(levels):
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)

    padded = masks(queries, None, flat(maps), shapes, padding, all_stages=True)
    cut = masks(queries, None, flat([m[..., : m.shape[-1] // 2] for m in maps]), small, None, all_stages=True)
    assert len(padded.values) == 3
    for one, other in zip(padded.values, cut.values, strict=True):
        assert torch.allclose(one[..., :4], other, atol=1e-12)
        assert not one[..., 4:].any()
    assert torch.allclose(padded.states[-1], cut.states[-1], atol=1e-12)
    valid = ~padding[:, :64].view(1, 8, 8)
    raised = raise_resolution(padded.values[-1], valid, (16, 16))
    assert torch.allclose(raised[..., :8], raise_resolution(cut.values[-1], None, (16, 8)), atol=1e-12)


def test_values_become_logits_of_a_probability():
    logits = logits_of_values(torch.tensor([0.0, 0.5, 0.75, 1.0, 7.0]))
    assert logits.sigmoid().tolist() == pytest.approx([1e-4, 0.5, 0.75, 1 - 1e-4, 1 - 1e-4], abs=1e-6)


# --- the decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_layers", [False, True])
def test_shapes_and_order_of_the_predictions(all_layers):
    predictions = run(decoder(), memory_of(), all_layers=all_layers, need_weights=True)
    assert len(predictions) == (4 if all_layers else 1)  # 3 blocks and the tail of stuff
    for prediction in predictions:
        assert prediction.class_logits.shape == (2, 7, 5)
        assert prediction.mask_logits.shape == (2, 7, 16, 24)
        assert prediction.states.shape == (2, 7, 16)
        assert prediction.cross_attention.shape == (2, 4, 7, 96 + 24 + 6)
        assert torch.allclose(prediction.cross_attention.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64), atol=1e-5)
    location = predictions[-1].location
    assert all(prediction.location is None for prediction in predictions[:-1])
    assert location.boxes.shape == (2 if all_layers else 1, 2, 5, 4)
    assert location.thing_class_logits.shape == (2 if all_layers else 1, 2, 5, 2)
    assert location.stuff_class_logits.shape == (3 if all_layers else 1, 2, 2)
    assert location.stuff_masks.shape == (4 if all_layers else 1, 2, 2, 8, 12)
    assert location.thing_masks(torch.tensor([[0, 4], [1, 1]])).shape == (3 if all_layers else 1, 2, 2, 8, 12)


def test_the_last_of_all_layers_is_what_inference_gives():
    model, memory = decoder(), memory_of()
    every, last = run(model, memory, all_layers=True), run(model, memory)
    for one, other in zip(every[-1][:3], last[-1][:3], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(every[0].mask_logits, every[-1].mask_logits)
    lean = run(model, memory, all_layers=True, full_masks=False)
    assert [prediction.mask_logits is None for prediction in lean] == [True, True, True, False]
    assert torch.allclose(lean[-1].mask_logits, last[-1].mask_logits, atol=1e-5)
    for one, other in zip(every, lean, strict=True):
        assert torch.allclose(one.class_logits, other.class_logits, atol=1e-5)
        assert torch.allclose(one.states, other.states, atol=1e-5)


def test_a_query_can_only_be_what_it_stands_for():
    logits = run(decoder(), memory_of())[-1].class_logits
    impossible = logits == IMPOSSIBLE
    things, stuff = impossible[:, :5], impossible[:, 5:]
    assert (things == torch.tensor([True, False, True, False, False])).all()
    assert (stuff[:, 0] == torch.tensor([False, True, True, True, False])).all()  # class 0
    assert (stuff[:, 1] == torch.tensor([True, True, False, True, False])).all()  # class 2
    assert (logits[..., -1] == 0).all()
    location = run(decoder(), memory_of())[-1].location
    assert torch.equal(logits[:, :5, [1, 3]], location.thing_class_logits[-1])
    assert torch.equal(torch.stack([logits[:, 5, 0], logits[:, 6, 2]], 1), location.stuff_class_logits[-1])


def test_a_thing_mask_does_not_depend_on_the_other_queries():
    model = decoder()
    prediction = run(model, memory_of(), all_layers=True)[-1]
    chosen = torch.tensor([[3, 0], [4, 2]])
    values = prediction.location.thing_masks(chosen)[-1]
    logits = logits_of_values(raise_resolution(values, None, (16, 24)))
    for image in range(2):
        assert torch.allclose(logits[image], prediction.mask_logits[image, chosen[image]], atol=1e-5)


def test_boxes_start_at_the_reference_points_and_hold_an_eighth_of_the_canvas():
    model = decoder(layers=3)
    boxes = run(model, memory_of(), all_layers=True)[-1].location.boxes
    centres = model.reference_points(model.thing_queries.weight[:, :16]).sigmoid()
    size = torch.tensor(-2.0, dtype=torch.float64).sigmoid()
    for layer in boxes:
        assert torch.allclose(layer[..., :2], centres.expand(2, -1, -1), atol=1e-5)
        assert torch.allclose(layer[..., 2:], size.expand(2, 5, 2), atol=1e-5)


def test_each_layer_refines_the_box_of_the_one_before_without_gradient_through_it():
    model = decoder(layers=2)
    for predictor in model.box_predictors:
        torch.nn.init.normal_(predictor.layers[-1].weight, std=0.5)
    boxes = run(model, memory_of(), all_layers=True)[-1].location.boxes
    assert not torch.allclose(boxes[0], boxes[1], atol=1e-2)
    (gradient,) = torch.autograd.grad(boxes[1].sum(), model.box_predictors[0].layers[-1].bias, allow_unused=True)
    assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(
        run(model, memory_of(), all_layers=True)[-1].location.boxes[0].sum(), model.reference_points.bias
    )
    assert gradient.abs().sum() > 0


def test_noise_in_the_padding_changes_nothing():
    model, memory = decoder(), memory_of()
    padding = padding_of([64, 40], [96, 70])
    clean = run(model, memory, padding, all_layers=True)
    noisy = []
    for level in memory:
        cells = F.interpolate(padding[:, None].float(), size=level.shape[-2:], mode="nearest") > 0.5
        noisy.append(torch.where(cells, 50 * torch.randn_like(level), level))
    assert not torch.equal(noisy[0], memory[0])
    for one, other in zip(clean, run(model, noisy, padding, all_layers=True), strict=True):
        for part, changed in zip(one[:3], other[:3], strict=True):
            assert torch.allclose(part, changed, atol=1e-6)
    assert (clean[-1].mask_logits[1, :, 11:] < -9).all()  # beyond the cells that a valid one is mixed into


def test_the_batch_neighbours_change_nothing():
    model, memory, padding = decoder(), memory_of(images=3), padding_of([64, 40, 56], [96, 70, 33])
    together = run(model, memory, padding)[-1]
    for image in range(3):
        alone = run(model, [level[image : image + 1] for level in memory], padding[image : image + 1])[-1]
        for one, other in zip(together[:3], alone[:3], strict=True):
            assert torch.allclose(one[image], other[0], atol=1e-5)


@pytest.mark.parametrize(("thing_label_ids", "queries"), [([], 4), ([0, 1, 2, 3], 5)])
def test_only_stuff_or_only_things(thing_label_ids, queries):
    model = decoder(thing_label_ids=thing_label_ids)
    assert model.num_queries == queries
    for all_layers in (False, True):
        predictions = run(model, memory_of(), all_layers=all_layers)
        assert predictions[-1].class_logits.shape == (2, queries, 5)
        assert predictions[-1].mask_logits.shape == (2, queries, 16, 24)
        assert predictions[-1].class_logits.isfinite().all()


def test_other_widths_of_memory_are_projected_and_the_mask_size_can_be_set():
    channels = (8, 16, 24, 16)
    prediction = run(decoder(channels), memory_of(channels=channels), mask_size=(15, 23))[-1]
    assert prediction.mask_logits.shape == (2, 7, 15, 23)
    assert prediction.location.mask_size == (15, 23)


def test_one_level_of_memory_is_too_few():
    with pytest.raises(ValueError, match="2 or more levels of memory, got 1"):
        decoder((16,))


# --- training and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_masks", [True, False])
def test_masks_that_the_loss_makes_itself_carry_no_gradient(full_masks):
    model = decoder().train()
    prediction = run(model, memory_of(), all_layers=True, full_masks=full_masks)[-1]
    (gradient,) = torch.autograd.grad(
        prediction.mask_logits[:, :5].sum(), model.thing_masks.tail.query.weight, allow_unused=True
    )
    assert (gradient is not None and bool(gradient.any())) == full_masks
    values = prediction.location.thing_masks(torch.tensor([[0, 1], [2, 3]]))
    (gradient,) = torch.autograd.grad(values.sum(), model.thing_masks.tail.query.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_half_precision_keeps_boxes_and_masks_in_float32(way):
    single = {"dtype": torch.float32}
    model, memory, padding = decoder(**single).train(), memory_of(**single), padding_of([64, 40], [96, 70])
    if way == "bfloat16":
        model, memory = model.to(torch.bfloat16), [level.to(torch.bfloat16) for level in memory]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        prediction = run(model, memory, padding, all_layers=True)[-1]
    location = prediction.location
    assert location.boxes.dtype == location.stuff_masks.dtype == prediction.mask_logits.dtype == torch.float32
    (location.boxes.sum() + prediction.mask_logits.sum() + prediction.class_logits.sum()).backward()
    exact = run(decoder(**single).train(), memory_of(**single), padding, all_layers=True)[-1]
    assert torch.allclose(location.boxes, exact.location.boxes, atol=0.02)
    assert (prediction.mask_logits - exact.mask_logits).abs().mean() < 0.2


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for again in (False, True):
        model = decoder().train()
        for module in model.modules():
            if again and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = lambda call, *inputs: torch.utils.checkpoint.checkpoint(
                    call, *inputs, use_reentrant=False
                )
        prediction = run(model, memory_of(), padding_of([64, 40], [96, 70]), all_layers=True)[-1]
        values = prediction.location.thing_masks(torch.tensor([[0, 1], [2, 3]]))
        (values.sum() + prediction.location.stuff_masks.sum() + prediction.location.boxes.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


@pytest.mark.parametrize("padded", [False, True])
def test_inference_can_be_exported(padded):
    class Inference(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            *memory, padding = inputs
            prediction = run(self.model, memory, padding if padded else None)[-1]
            return prediction.class_logits, prediction.mask_logits

    inputs = (*memory_of(), padding_of([64, 40], [96, 70]))
    module = Inference(decoder()).eval()
    exported = torch.export.export(module, inputs).module()
    for one, other in zip(module(*inputs), exported(*inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_parameters_at_the_published_size():
    with torch.device("meta"):
        model = LocationQueryDecoder(
            [256] * 4,
            dim=256,
            layers=6,
            heads=8,
            ffn_dim=1024,
            dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.0,
            activation="relu",
            points=4,
            num_thing_queries=300,
            num_labels=133,
            thing_label_ids=list(range(80)),
            thing_mask_layers=4,
            stuff_mask_layers=6,
        )
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    attention, deformable, feed_forward = (
        4 * 256 * 257,
        2 * 256 * 257 + 257 * 0 + 256 * 384 + 384,
        2 * 256 * 1024 + 1280,
    )
    assert counts["layers"] == 6 * (attention + deformable + feed_forward + 3 * 512)
    small = 3 * 8 * 9 + 25  # the linear layers that make a mask of the maps
    block, tail = attention + feed_forward + 2 * 512 + small, 2 * 256 * 257 + small
    assert counts["thing_masks"] == 4 * block + tail
    assert counts["stuff_masks"] == 6 * (block + attention + 512) + tail
    assert sum(counts.values()) == 16_970_828
