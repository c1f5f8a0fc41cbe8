"""Queries that start from the pixels of objects: the map, the anchors, the mask head and the matching by place."""

import math

import numpy as np
import pytest
import torch

from hf_maskformer.model.initialization import initialize
from hf_maskformer.model.mask_head import PLACE_UNIT, AnchoredDotProductMaskHead
from hf_maskformer.model.matcher import location_cost
from hf_maskformer.model.objectness import NO_ANCHOR, at_anchors, objectness_loss, objectness_target, pick_anchors
from hf_maskformer.presets import preset
from model.variant_tester import batch, build, tiny

ANCHORED = "maskformer-light-anchored"


def blocks(*corners, side=5, size=(16, 20)):
    """(N, h, w) squares with these top left corners."""
    masks = torch.zeros(len(corners), *size, dtype=torch.float64)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + side, left : left + side] = 1
    return masks


# --- the map ---------------------------------------------------------------------------------------------------------


def test_the_target_is_one_in_the_middle_and_falls_as_a_gaussian():
    target = objectness_target(blocks((2, 3)))
    assert target[4, 5].item() == 1
    variance = 2 + 1 / 12  # of 5 cells in a row: 2; of the extent of a cell: 1/12
    assert target[4, 6].item() == pytest.approx(math.exp(-0.5 / variance), abs=1e-12)
    assert target[2, 3].item() == pytest.approx(math.exp(-0.5 * 8 / variance), abs=1e-12)
    assert target[4, 8].item() == 0
    assert (target > 0).sum() == 25


def test_touching_objects_keep_a_peak_each():
    target = objectness_target(blocks((2, 3), (2, 8)))
    assert target[4, 5].item() == target[4, 10].item() == 1
    assert target[4, 7] < 0.5
    assert target[4, 8] < 0.5


def test_a_bump_follows_the_direction_of_its_object():
    mask = torch.zeros(1, 16, 16, dtype=torch.float64)
    for index in range(10):
        mask[0, index + 2, index + 2 : index + 4] = 1
    target = objectness_target(mask)
    assert target.max() == 1
    middle = np.unravel_index(int(target.argmax()), (16, 16))
    assert abs(middle[0] - 6.5) <= 1
    assert target[3, 4] < target[6, 7]


def test_one_cell_and_no_object():
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2] = 1
    assert torch.equal(objectness_target(mask), mask[0])
    assert objectness_target(torch.zeros(0, 4, 4)).sum() == 0
    assert objectness_target(torch.zeros(1, 4, 4)).isfinite().all()  # smaller than a cell


def test_the_loss_is_weighed_by_the_error():
    logits = torch.zeros(1, 1, 3, dtype=torch.float64)
    target = torch.tensor([[[0.5, 1.0, 0.0]]], dtype=torch.float64)
    valid = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    assert objectness_loss(logits, target, valid).tolist() == [pytest.approx(0.25 * math.log(2), abs=1e-12)]


# --- anchors ---------------------------------------------------------------------------------------------------------


def test_anchors_are_the_highest_peaks_first():
    heights = torch.full((1, 6, 7), -3.0)
    heights[0, 1, 1], heights[0, 1, 2], heights[0, 4, 5] = 2.0, 1.9, 1.0  # the second stands beside the first
    anchors = pick_anchors(heights, None, count=2)
    assert anchors.tolist() == [[[1, 1], [4, 5]]]


def test_anchors_are_not_in_the_padding():
    heights = torch.zeros(1, 4, 6)
    heights[0, 2, 5] = 9.0
    heights[0, 1, 2] = 1.0
    padding = torch.zeros(1, 4, 6, dtype=torch.bool)
    padding[..., 4:] = True
    anchors = pick_anchors(heights, padding, count=20)  # of 16 cells
    assert anchors[0, 0].tolist() == anchors[0, 16].tolist() == [1, 2]
    assert anchors[0, :, 1].max() < 4


def test_a_map_with_fewer_cells_than_queries_gives_cells_twice():
    anchors = pick_anchors(torch.arange(4.0).view(1, 2, 2), None, count=6)
    assert anchors.shape == (1, 6, 2)
    assert anchors[0, 0].tolist() == anchors[0, 4].tolist() == [1, 1]


def test_values_at_anchors():
    maps = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    anchors = torch.tensor([[[0, 0], [3, 4]], [[1, 2], [2, 1]]])
    values = at_anchors(maps, anchors)
    assert torch.equal(values[0, 1], maps[0, :, 3, 4])
    assert torch.equal(values[1, 0], maps[1, :, 1, 2])


# --- mask head -------------------------------------------------------------------------------------------------------


def test_the_head_adds_a_paraboloid_around_the_anchor():
    head = AnchoredDotProductMaskHead(6, mask_dim=3, layers=1).double()
    features, states = torch.randn(1, 3, 12, 15).double(), torch.randn(1, 2, 6).double()
    anchors = torch.tensor([[[4, 9], [NO_ANCHOR, NO_ANCHOR]]])
    logits = head(states, features, anchors)
    plain = torch.einsum("bqe,behw->bqhw", head.embedding(states), features)
    ay, ax, by, bx, constant = head.place(states)[0, 0]
    softplus = torch.nn.functional.softplus
    y, x = (7 - 4) / PLACE_UNIT, (2 - 9) / PLACE_UNIT
    added = -softplus(ay) * y**2 - softplus(ax) * x**2 + by * y + bx * x + constant
    assert (logits - plain)[0, 0, 7, 2].item() == pytest.approx(added.item(), abs=1e-12)
    torch.testing.assert_close(logits[0, 1], plain[0, 1])


def test_a_new_head_makes_a_disc_around_the_anchor():
    torch.manual_seed(0)
    head = AnchoredDotProductMaskHead(6, mask_dim=3, layers=1)
    initialize(head)
    logits = head(torch.zeros(1, 1, 6), torch.zeros(1, 3, 32, 32), torch.tensor([[[10, 20]]]))[0, 0]
    inside = (logits > 0).nonzero()
    assert inside.double().mean(0).tolist() == [10, 20]
    radius = PLACE_UNIT / math.sqrt(math.log(1 + math.e))
    assert len(inside) == pytest.approx(math.pi * radius**2, rel=0.1)


def test_torchs_own_initial_weights_keep_the_disc_and_a_loaded_checkpoint(tmp_path):
    config = tiny(ANCHORED, initialization="torch")
    model = build(config)
    assert model.model.mask_head.place.bias.tolist() == [1, 1, 0, 0, 1]
    attention = model.model.query_decoder.layers[0].self_attention.query
    bound = 1 / math.sqrt(attention.in_features)  # of torch's uniform weights and biases
    assert 0.8 * bound < attention.bias.abs().max() <= bound
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, num_queries=9)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_head_needs_anchors():
    head = AnchoredDotProductMaskHead(6, mask_dim=3, layers=1)
    with pytest.raises(ValueError, match="query_decoder 'anchored'"):
        head(torch.zeros(1, 1, 6), torch.zeros(1, 3, 4, 4), None)


# --- matching --------------------------------------------------------------------------------------------------------


def test_things_belong_to_queries_inside_and_stuff_to_its_own():
    masks = torch.stack([blocks((0, 0))[0], blocks((0, 8))[0], torch.ones(16, 20)])[None]
    anchors = torch.tensor([[[NO_ANCHOR, NO_ANCHOR], [2, 2], [2, 9], [12, 12]]])
    labels = torch.tensor([[1, 1, 0]])  # class 0 is stuff, its query is the first
    cost = location_cost(anchors, masks, labels, torch.tensor([0, -1]), cost=7.0)
    assert cost[0].tolist() == [[14, 14, 0], [0, 7, 14], [7, 0, 14], [7, 7, 14]]


def test_the_nearest_of_two_queries_in_a_thing_is_matched_and_shared_by_all_layers():
    config = tiny(ANCHORED)
    model = build(config)
    inputs = batch(config, counts=(3, 2))
    output = model(**inputs, output_auxiliary_logits=True)
    assert len(output.auxiliary_logits) == config.query_decoder_layers  # the start is a prediction too
    assert set(output.loss_dict) == {"loss_class", "loss_mask", "loss_dice", "loss_pixel", "loss_objectness"}
    assert output.layer_losses["loss_class"].shape == (config.query_decoder_layers + 1,)
    calls = []
    original = model.criterion._mask_terms

    def recorded(masks, wanted, valid, matches, **keywords):
        calls.append(matches)
        return original(masks, wanted, valid, matches, **keywords)

    model.criterion._mask_terms = recorded
    model(**inputs)
    first, *others = calls[0]
    for layer in others:
        for (queries, segments), (same_queries, same_segments) in zip(first, layer, strict=True):
            assert queries.tolist() == same_queries.tolist()
            assert segments.tolist() == same_segments.tolist()
    labels = inputs["class_labels"]
    for image, (queries, segments) in enumerate(first):
        for query, segment in zip(queries.tolist(), segments.tolist(), strict=True):
            label = int(labels[image][segment])
            assert query == label if label < 2 else query >= 2  # road and tree are stuff, car is a thing


def test_one_to_many_is_the_mean_over_the_queries_of_a_thing():
    config = tiny(ANCHORED, loss_one_to_many_weight=0.5, query_decoder_layers=1)
    model = build(config)
    inputs = batch(config, counts=(3, 0))
    output = model(**inputs)
    assert output.loss_dict["loss_one_to_many"].isfinite()
    terms, weights = output.loss_dict, model.criterion.weights
    torch.testing.assert_close(output.loss, sum(weights[name] * term for name, term in terms.items()))
    masks, wanted, valid = torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4)
    wanted[0, 0, :2] = 1
    anchors = torch.tensor([[[0, 0], [1, 1], [3, 3]]])
    belongs = model.criterion._things_of_queries([torch.tensor([2])], wanted, anchors)
    assert belongs[0, :, 0].tolist() == [True, True, False]
    term = model.criterion._one_to_many_term(masks, wanted, valid, belongs, padded=False)
    first = torch.tensor([0])
    pairs = [model.criterion._pair_losses(masks[:, q], wanted, valid, first, first, False) for q in (0, 1)]
    focal, dice = sum(pairs).div(2)[:, 0]
    expected = weights["loss_mask"] * focal + weights["loss_dice"] * dice
    assert term.item() == pytest.approx(expected.item(), rel=1e-6)


# --- the whole model -------------------------------------------------------------------------------------------------


def test_padding_cannot_reach_an_image_of_fewer_cells_than_queries():
    decoder = build(tiny(ANCHORED, num_queries=20, query_decoder_memory_stride=8)).eval().model
    padding = torch.ones(1, 64, 64, dtype=torch.bool)
    padding[:, :16, :16] = False  # 16 cells of 1/4
    torch.manual_seed(0)
    features, memory = torch.randn(1, 16, 16, 16), [torch.randn(1, 32, 64 // s, 64 // s) for s in (8, 16, 32)]
    noisy = features.masked_fill(padding[:, None, ::4, ::4], 5.0), [level.clone() for level in memory]
    noisy[1][0].masked_fill_(padding[:, None, ::8, ::8], 5.0)
    heads = {"class_head": decoder.class_head, "mask_head": decoder.mask_head, "all_layers": True}
    with torch.no_grad():
        clean = decoder.query_decoder(memory, features, padding, **heads)[-1]
        spoilt = decoder.query_decoder(noisy[1], noisy[0], padding, **heads)[-1]
    torch.testing.assert_close(spoilt.class_logits, clean.class_logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(spoilt.mask_logits[..., :4, :4], clean.mask_logits[..., :4, :4], atol=1e-5, rtol=0)


def test_things_listed_twice_count_once():
    assert tiny(ANCHORED, thing_label_ids=[2, 2]).thing_label_ids == [2]


def test_things_only_have_no_stuff_query():
    model = build(tiny(ANCHORED, thing_label_ids=[0, 1, 2], task="instance"))
    assert model.model.query_decoder.stuff_queries is None
    assert model(torch.zeros(1, 3, 64, 64)).class_queries_logits.shape == (1, 6, 4)


def test_an_anchored_model_learns_to_find_small_squares():
    """What learned queries need thousands of steps for: 200 steps on one batch give each square its own mask."""
    torch.manual_seed(0)
    config = tiny(ANCHORED, thing_label_ids=[0], id2label={0: "square"}, task="instance", num_queries=12)
    model = build(config).train()
    images, masks = torch.zeros(2, 3, 64, 64), [torch.zeros(4, 64, 64, dtype=torch.bool) for _ in range(2)]
    for image, places in enumerate([((4, 4), (4, 40), (40, 6), (36, 44)), ((20, 8), (8, 30), (44, 24), (30, 46))]):
        for index, (top, left) in enumerate(places):
            masks[image][index, top : top + 14, left : left + 14] = True
            images[image, :, top : top + 14, left : left + 14] = 1.0
    inputs = {"pixel_values": images, "mask_labels": masks, "class_labels": [torch.zeros(4, dtype=torch.int64)] * 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        output = model(images)
    for image in range(2):
        found = output.class_queries_logits[image].softmax(-1)[:, 0] > 0.5
        predicted = torch.nn.functional.interpolate(output.masks_queries_logits[image][None], size=(64, 64))[0] > 0
        overlap = (predicted[found][:, None] & masks[image]).flatten(2).sum(2).double()
        union = (predicted[found][:, None] | masks[image]).flatten(2).sum(2)
        best = (overlap / union).max(0).values
        assert (best > 0.5).all(), best


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"matcher": "located", "query_decoder": "standard", "mask_head": "dot_product"}, "matcher 'located' needs"),
        ({"query_decoder": "standard", "matcher": "hungarian"}, "mask_head 'anchored_dot_product' needs"),
        ({"matcher": "fixed", "task": "semantic", "thing_label_ids": [0]}, "orders its queries otherwise"),
        ({"query_decoder": "standard", "loss_one_to_many_weight": 1.0}, "loss_one_to_many_weight is 1.0"),
        ({"num_queries": 2, "thing_label_ids": [2]}, "num_queries is 2"),
        ({"thing_label_ids": []}, "thing_label_ids is empty"),
    ],
)
def test_parts_that_do_not_go_together(overrides, message):
    with pytest.raises(ValueError, match=message):
        preset(ANCHORED, id2label={0: "a", 1: "b", 2: "c"}, **overrides)


def test_non_finite_objectness_is_named():
    config = tiny(ANCHORED)
    model = build(config)
    with torch.no_grad():
        model.model.query_decoder.objectness_head.output.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="objectness"):
        model(**batch(config))
