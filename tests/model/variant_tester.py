"""Checks that every member of the family must pass, run on a shrunken form of each preset.

A shrunken preset keeps its parts and drops width, depth and image size, so that a check takes a fraction of a second.
Every function takes a configuration and raises AssertionError; `test_presets.py` runs them over `list_presets()`.
"""

import copy
import math
import re
import tempfile
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from hf_maskformer.model.class_head import LinearClassHead
from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.layers import MLP, Attention, FeedForward
from hf_maskformer.model.mask_head import AnchoredDotProductMaskHead
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.objectness import PRIOR, ObjectnessHead
from hf_maskformer.presets import PRESETS, preset
from hf_maskformer.training.train import checkpoint_activations

LABELS = {0: "road", 1: "tree", 2: "car"}
QUERIES = 6
SIDE = 64
ODD_SIZE = (65, 97)

TINY: dict[str, Any] = {
    "criterion_points": 128,
    "pixel_decoder_dim": 32,
    "pixel_decoder_layers": 2,
    "pixel_decoder_heads": 4,
    "pixel_decoder_ffn_dim": 48,
    "mask_dim": 16,
    "query_decoder_dim": 32,
    "query_decoder_heads": 4,
    "query_decoder_ffn_dim": 48,
    "query_decoder_layers": 3,
    "query_decoder_thing_mask_layers": 2,
    "query_decoder_stuff_mask_layers": 3,
    "num_queries": QUERIES,
    "image_size": [SIDE, SIDE],
    "id2label": LABELS,
    "thing_label_ids": [2],
}
# What shrinks a backbone, by its model_type; everything else of it (layer type, drop path, ...) stays.
TINY_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet": {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40], "embedding_size": 8},
    "pvt_v2": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 4]},
    "swin": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
}
# Small relatives of timm's backbones, which have no configuration to shrink.
TINY_TIMM = {
    "timm/mobilenetv3_small_100": "timm/mobilenetv3_small_050",
    "timm/mobilenetv3_large_100": "timm/mobilenetv3_small_050",
    "timm/mobilenetv4_conv_small": "timm/mobilenetv4_conv_small_035",
}
# Parts of a backbone that checkpointing need not recompute: before the first stage, and norms behind the last.
NOT_RECOMPUTED = ("embed", "stem", "conv1", "bn1", "norms", "swin.layernorm")


def tiny(name: str, **overrides: Any) -> HfMaskFormerConfig:
    """The shrunken form of a preset."""
    fields = PRESETS[name].fields
    if "backbone" in fields:
        return preset(name, **{"backbone": TINY_TIMM[fields["backbone"]], **TINY, **overrides})
    small = {**fields["backbone_config"], **TINY_BACKBONES[fields["backbone_config"]["model_type"]]}
    return preset(name, **{"backbone_config": small, **TINY, **overrides})


def build(config: HfMaskFormerConfig, seed: int = 0) -> HfMaskFormerForUniversalSegmentation:
    torch.manual_seed(seed)
    return HfMaskFormerForUniversalSegmentation(config)


def batch(
    config: HfMaskFormerConfig,
    *,
    size: tuple[int, int] = (SIDE, SIDE),
    counts: tuple[int, ...] = (2, 1),
    seed: int = 0,
) -> dict[str, Any]:
    """Images with rectangles as targets; the right quarter of the last image is padding."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    pixel_mask = torch.ones((len(counts), height, width), dtype=torch.int64)
    pixel_mask[-1, :, width * 3 // 4 :] = 0
    pixel_values = torch.randn((len(counts), config.num_channels, height, width), generator=generator)
    mask_labels = []
    for image, count in enumerate(counts):
        masks = torch.zeros((count, height, width), dtype=torch.bool)
        for index in range(count):
            top, left = index * 5 % (height // 2), index * 7 % (width // 2)
            masks[index, top : top + height // 3, left : left + width // 3] = True
        mask_labels.append(masks & pixel_mask[image].bool())
    labels = [torch.arange(count) % config.num_labels for count in counts]
    return {
        "pixel_values": pixel_values * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
        "mask_labels": mask_labels,
        "class_labels": labels,
        "point_seeds": torch.arange(len(counts)) + seed,
    }


def unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask")}


def gradients(model: nn.Module, inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of one training step by parameter name; the seed fixes dropout and drop path."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_trained(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A finite float32 loss, and a finite gradient for every parameter that is not frozen (DDP needs all of them)."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    assert output.loss.dtype == torch.float32
    assert math.isfinite(output.loss.item())
    output.loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    assert not without, f"no gradient for {without}"
    broken = [name for name, parameter in trainable.items() if not parameter.grad.isfinite().all()]
    assert not broken, f"non-finite gradient for {broken}"


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert actual[name] is not None, f"no gradient for {name}"
        error = (actual[name] - gradient).norm().item()
        assert error <= 1e-3 * gradient.norm().item() + 1e-6, f"{name}: off by {error}"


def assert_shapes(output: Any, config: HfMaskFormerConfig, *, images: int, size: tuple[int, int]) -> None:
    cells = (images, config.num_queries, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert output.class_queries_logits.shape == (images, config.num_queries, config.num_labels + 1)
    assert output.masks_queries_logits.shape == cells


# --- training --------------------------------------------------------------------------------------------------------


def check_training_step(config: HfMaskFormerConfig) -> None:
    """Every part learns: no parameter is without gradient, and none of the parts has only zero gradients."""
    model = build(config).train()
    inputs = batch(config)
    assert_trained(model, inputs)
    parts = {name.split(".")[1] if name.startswith("model.") else name.split(".")[0] for name in model.state_dict()}
    for part in parts:
        total = sum(
            parameter.grad.abs().sum().item()
            for name, parameter in model.named_parameters()
            if part in name.split(".")[:2] and parameter.grad is not None
        )
        assert total > 0, f"{part} does not learn"
    assert_shapes(model(**inputs), config, images=2, size=(SIDE, SIDE))


def check_odd_size(config: HfMaskFormerConfig) -> None:
    model = build(config).train()
    inputs = batch(config, size=ODD_SIZE)
    assert_trained(model, inputs)
    with torch.no_grad():
        assert_shapes(model.eval()(**unlabelled(inputs)), config, images=2, size=ODD_SIZE)


def check_empty_targets(config: HfMaskFormerConfig) -> None:
    """Images without a single target: some of the batch, or all of it."""
    model = build(config).train()
    assert_trained(model, batch(config, counts=(0, 2)))
    inputs = batch(config, counts=(0, 0))
    assert_trained(model, inputs)
    loss_dict = model(**inputs).loss_dict
    for name in {"loss_mask", "loss_dice", "loss_box", "loss_giou", "loss_stuff_dice"} & loss_dict.keys():
        assert loss_dict[name].item() == 0, name
    assert {"loss_dice", "loss_class"} <= loss_dict.keys()
    assert loss_dict["loss_class"].item() > 0


def check_more_targets_than_queries(config: HfMaskFormerConfig) -> None:
    inputs = batch(config, counts=(config.num_queries + 3, 1))
    inputs["class_labels"][0].fill_(config.thing_label_ids[0])
    assert_trained(build(config).train(), inputs)


def check_auxiliary_supervision(config: HfMaskFormerConfig) -> None:
    """With every layer supervised the terms are sums over layers, and switching it off leaves the last layer's."""
    inputs = batch(config)
    model = build(config).eval()
    with torch.no_grad():
        every = model(**inputs).loss_dict
        model.config.loss_auxiliary = False
        last = model(**inputs).loss_dict
        model.config.loss_auxiliary = True
    assert every.keys() == last.keys()
    assert every["loss_class"] > last["loss_class"] * 1.5


def check_bfloat16(config: HfMaskFormerConfig) -> None:
    inputs = batch(config)
    still = build(config).eval()  # without dropout and drop path only the precision differs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_loss = still(**inputs).loss
    full_loss = still(**inputs).loss
    assert autocast_loss.dtype == torch.float32
    # Rounded heights may pick other pixels for anchors, which are other queries.
    tolerance = 0.05 if config.query_decoder == "anchored" else 0.02
    assert abs(autocast_loss.item() - full_loss.item()) < tolerance * full_loss.item()
    model = build(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_trained(model, inputs)
    assert_trained(build(config).to(torch.bfloat16).train(), inputs)


def check_float16(config: HfMaskFormerConfig) -> None:
    """The loss of a float16 model; its gradients need a loss scaler and are not looked at."""
    loss = build(config).to(torch.float16).train()(**batch(config)).loss
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())


def check_gradient_checkpointing(config: HfMaskFormerConfig) -> None:
    """The gradients stay the same, and the layers really run a second time.

    In float64: autograd adds up gradients in another order, and in float32 a mask logit whose rounding crosses 0
    changes what a query of Mask2Former may look at.
    """
    inputs = batch(config)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    model = build(config).double().train()
    expected = gradients(model, inputs)
    checkpoint_activations(model)
    calls = count_calls(model)
    actual = gradients(model, inputs)
    assert_recomputed(model, calls)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )
    older = getattr(model, "gradient_checkpointing_disable", None)  # transformers 5.17 to 5.23
    getattr(model, "activation_checkpointing_disable", older)()
    calls.clear()
    gradients(model, inputs)
    layer_calls = [count for name, count in calls.items() if "query_decoder.layers" in name]
    assert set(layer_calls) == {1}, "checkpointing cannot be switched off"


def count_calls(model: nn.Module) -> Counter:
    """Counts the forward calls of every module that has parameters of its own."""
    calls: Counter = Counter()

    def counted(name: str):
        return lambda *_: calls.update([name])

    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(counted(name))
    return calls


def assert_recomputed(model: nn.Module, calls: Counter) -> None:
    """Every layer of the transformers, and all of the backbone but its stem, ran at least twice."""
    once = {name for name, count in calls.items() if count < 2}
    layers = {name for name in calls if ".layers." in name and "decoder.layers" in name}
    assert layers
    assert not once & layers, f"not recomputed: {sorted(once & layers)}"
    body = {name for name in calls if name.startswith("model.backbone.body.")}
    assert body
    kept = {name for name in once & body if not any(part in name for part in NOT_RECOMPUTED)}
    assert not kept, f"not recomputed: {sorted(kept)}"


# --- files and copies ------------------------------------------------------------------------------------------------


def check_save_and_load(config: HfMaskFormerConfig, folder: Any) -> None:
    """Weights equal to the last bit, nothing missing, the same parameters frozen."""
    model = build(config).eval()
    model.save_pretrained(folder)
    loaded, report = HfMaskFormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": loaded.config._name_or_path}
    assert frozen(loaded) == frozen(model)
    weights, expected_weights = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
    inputs = batch(config)
    with torch.no_grad():
        # Weights that lie elsewhere in memory may round a product's last bit differently.
        actual, expected = loaded.eval()(**inputs), model(**inputs)
        torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=1e-5, atol=1e-5)
        assert_masks_close(actual.masks_queries_logits, expected.masks_queries_logits, config, tolerance=1e-5)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)


def check_deepcopy(config: HfMaskFormerConfig) -> None:
    """A copy gives the same outputs and shares no weight (EMA depends on it)."""
    model = build(config).eval()
    duplicate = copy.deepcopy(model)
    inputs = batch(config)
    with torch.no_grad():
        expected = model(**inputs)
        assert_same(duplicate(**inputs), expected)
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
        assert_same(model(**inputs), expected)
    assert frozen(duplicate) == frozen(model)


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.class_queries_logits, expected.class_queries_logits)
    assert torch.equal(actual.masks_queries_logits, expected.masks_queries_logits)
    if expected.loss is not None:
        # Weights that lie elsewhere in memory may round a product's last bit differently.
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)


# --- initial weights -------------------------------------------------------------------------------------------------


def check_initial_weights(config: HfMaskFormerConfig) -> None:
    """Each part begins as its published code does, not as torch's modules do; also what a checkpoint does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        build(config).save_pretrained(folder)
        more = {"id2label": dict(enumerate("abcdefg")), "thing_label_ids": [2, 3, 4, 5, 6], "num_queries": QUERIES + 2}
        changed = HfMaskFormerForUniversalSegmentation.from_pretrained(folder, ignore_mismatched_sizes=True, **more)
    for model in (build(config), changed):
        for name, module in model.model.named_modules():
            if config.query_decoder == "location" and re.search(r"box_predictors|_masks\b", name):
                continue  # boxes begin at one place, mask decoders with torch's biases: see test_location.py
            if isinstance(module, Attention | FeedForward | MLP | LinearClassHead):
                for linear in (part for part in module.modules() if isinstance(part, nn.Linear)):
                    assert linear.bias.abs().max() == 0, name
                    xavier = math.sqrt(2 / (linear.in_features + linear.out_features))
                    tolerance = 0.35 if linear.weight.numel() < 500 else 0.15
                    assert abs(linear.weight.std().item() / xavier - 1) < tolerance, name
            elif isinstance(module, ObjectnessHead):
                assert math.isclose(module.output.bias.item(), math.log(PRIOR / (1 - PRIOR)), rel_tol=1e-6)
            elif isinstance(module, AnchoredDotProductMaskHead):
                assert module.place.bias.tolist() == [1, 1, 0, 0, 1]
        positions = [value for name, value in model.named_parameters() if name.endswith("query_positions.weight")]
        assert all(0.8 < value.std().item() < 1.2 for value in positions)


# --- what forward returns --------------------------------------------------------------------------------------------


def check_outputs(config: HfMaskFormerConfig) -> None:
    """Extras come only when asked for, with and without labels, and never change the predictions."""
    model = build(config).eval()
    labelled = batch(config)
    layers, queries = config.query_decoder_layers, config.num_queries
    predictions = layers + (config.query_decoder in ("anchored", "masked"))  # whose start is a prediction too
    if config.query_decoder == "location":  # the stages of the deeper mask decoder: its layers and a tail
        mask_layers = (config.query_decoder_thing_mask_layers, config.query_decoder_stuff_mask_layers)
        layers = predictions = max(mask_layers) + 1
    for inputs in (labelled, unlabelled(labelled)):
        with torch.no_grad():
            plain = model(**inputs)
            full = model(**inputs, output_auxiliary_logits=True, output_hidden_states=True, output_attentions=True)
        assert (plain.loss is not None) == ("mask_labels" in inputs)
        assert plain.auxiliary_logits is None
        assert plain.hidden_states is None
        assert plain.attentions is None
        assert torch.equal(plain.valid_extent, torch.tensor([[1.0, 1.0], [1.0, 0.75]]))
        assert len(full.auxiliary_logits) == predictions - 1
        assert [states.shape for states in full.hidden_states] == [
            (2, queries, config.query_decoder_dim)
        ] * predictions
        assert len(full.attentions) == layers
        for weights in full.attentions:
            assert weights.shape[:3] == (2, config.query_decoder_heads, queries)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        torch.testing.assert_close(full.class_queries_logits, plain.class_queries_logits, rtol=1e-4, atol=1e-5)
        assert_masks_close(full.masks_queries_logits, plain.masks_queries_logits, config, tolerance=1e-4)


def check_each_flag_in_training(config: HfMaskFormerConfig) -> None:
    """No flag of forward breaks a training step, alone or as a tuple (`return_dict=False`)."""
    model = build(config).train()
    inputs = batch(config)
    for flag in ("output_auxiliary_logits", "output_hidden_states", "output_attentions"):
        model(**inputs, **{flag: True}).loss.backward()
    values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    assert values[0].ndim == 0
    values[0].backward()
    with torch.no_grad():
        model.eval()
        named, positional = model(**inputs), model(**inputs, return_dict=False)
        assert torch.equal(positional[0], named.loss)
        assert len(positional) == len(named.to_tuple())
        without_labels = model(**unlabelled(inputs), return_dict=False)
        torch.testing.assert_close(without_labels[0], named.class_queries_logits, rtol=1e-5, atol=1e-5)
        assert_masks_close(without_labels[1], named.masks_queries_logits, config, tolerance=1e-5)


def assert_masks_close(actual: Tensor, expected: Tensor, config: HfMaskFormerConfig, *, tolerance: float) -> None:
    """Logits; where a value of 0..1 was turned into one, its probability: near 0 and 1 a logit magnifies rounding."""
    if config.query_decoder == "location":
        actual, expected = actual.sigmoid(), expected.sigmoid()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- export ----------------------------------------------------------------------------------------------------------


def check_export(config: HfMaskFormerConfig) -> None:
    """`torch.export` with a free batch size equals the model at a batch size it was not traced with."""
    model = build(config).eval()
    example = unlabelled(batch(config))
    images = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (), example, dynamic_shapes={name: {0: images} for name in example})
    inputs = unlabelled(batch(config, counts=(1, 1, 1), seed=3))
    with torch.no_grad():
        expected, actual = model(**inputs), program.module()(**inputs)
    for name in ("class_queries_logits", "valid_extent"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    assert_masks_close(actual["masks_queries_logits"], expected["masks_queries_logits"], config, tolerance=1e-5)
