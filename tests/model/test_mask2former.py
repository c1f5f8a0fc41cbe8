"""Mask2Former against transformers' from random weights: all layers' logits, the loss, both ways of conversion."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
)
from transformers.models.mask2former import modeling_mask2former as peer_module

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.point_sampling import PointSource
from hf_maskformer.presets import image_processor_for, preset

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "swin": {
        "model_type": "swin",
        "embed_dim": 24,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
    },
    "resnet": {
        "model_type": "resnet",
        "depths": [1, 1, 2, 1],
        "hidden_sizes": [16, 24, 32, 40],
        "embedding_size": 8,
        "layer_type": "bottleneck",
    },
}
FULL_BACKBONES = {
    "swin": {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "resnet": {"model_type": "resnet", "depths": [3, 4, 6, 3], "layer_type": "bottleneck"},
}
SIZES = {
    "feature_size": 64,
    "mask_feature_size": 32,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 6,
    "num_attention_heads": 4,
    "dim_feedforward": 80,
    "num_queries": 12,
    "train_num_points": 200,
}


def peer(backbone: dict, folder, **sizes) -> Mask2FormerForUniversalSegmentation:
    """transformers' model in eval mode, its sampling offsets not at their regular start, saved to `folder`."""
    torch.manual_seed(0)
    labels = dict(enumerate("abcde"))
    config = Mask2FormerConfig(backbone_config={**backbone, "out_features": STAGES}, id2label=labels, **sizes)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def batch(size: int) -> dict:
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(2, 5, size, size)
    for image in range(2):
        for index in range(5):
            top, left = torch.randint(0, size // 2, (2,), generator=generator).tolist()
            masks[image, index, top : top + size // 3, left : left + size // 4] = 1
    return {
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "mask_labels": [masks[0], masks[1, :3]],
        "class_labels": [torch.tensor([0, 4, 2, 2, 1]), torch.tensor([3, 3, 0])],
    }


def same_points(monkeypatch, dtype: torch.dtype) -> None:
    """Both sides draw the points of one table, by their number."""
    tables: dict[int, torch.Tensor] = {}

    def points(masks: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        tables.setdefault(count, torch.rand((count, 2), generator=generator))
        return tables[count].expand(masks, -1, -1)

    monkeypatch.setattr(PointSource, "draw", lambda self, image, masks, count: points(masks, count))
    real = torch.rand

    def rand(*size, **further):
        if len(size) == 3 and size[2] == 2:
            return points(size[0], size[1]).to(dtype).contiguous()
        return real(*size, **further)

    monkeypatch.setattr(peer_module.torch, "rand", rand)


def compare(backbone: dict, folder, monkeypatch, size: int, dtype: torch.dtype = torch.float32, **sizes) -> None:
    theirs = peer(backbone, folder, **sizes).to(dtype)
    ours = HfMaskFormerForUniversalSegmentation.from_pretrained(folder).eval().to(dtype)
    inputs = batch(size)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    inputs["mask_labels"] = [masks.to(dtype) for masks in inputs["mask_labels"]]
    images = {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        expected = theirs(**images, output_auxiliary_logits=True)
        actual = ours(**images, output_auxiliary_logits=True)
    assert len(actual.auxiliary_logits) == len(expected.auxiliary_logits) == theirs.config.decoder_layers - 1
    layers = [*zip(actual.auxiliary_logits, expected.auxiliary_logits, strict=True), (actual, expected)]
    for ours_layer, theirs_layer in layers:
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(ours_layer[name], theirs_layer[name], rtol=1e-4, atol=1e-4)

    same_points(monkeypatch, dtype)
    theirs_loss = theirs(**inputs).loss
    output = ours(**inputs)
    torch.testing.assert_close(output.loss, theirs_loss, rtol=1e-4, atol=1e-4)
    theirs_loss.backward()
    output.loss.backward()
    for ours_name, theirs_name in (
        ("model.query_decoder.query_positions", "model.transformer_module.queries_embedder"),
        ("model.pixel_decoder.mask_projection", "model.pixel_level_module.decoder.mask_projection"),
        (
            "model.pixel_decoder.layers.0.self_attention.sampling_offsets",
            "model.pixel_level_module.decoder.encoder.layers.0.self_attn.sampling_offsets",
        ),
    ):
        actual_gradient = ours.get_submodule(ours_name).weight.grad
        expected_gradient = theirs.get_submodule(theirs_name).weight.grad
        assert (actual_gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("name", BACKBONES)
def test_equal_to_transformers(name, tmp_path, monkeypatch):
    compare(BACKBONES[name], tmp_path, monkeypatch, 96, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_BACKBONES)
def test_equal_to_transformers_at_the_published_size(name, tmp_path, monkeypatch):
    """In float64: of millions of random mask logits some lie within float32's rounding of 0, and what a query may
    look at would depend on it."""
    compare(FULL_BACKBONES[name], tmp_path, monkeypatch, 256, dtype=torch.float64)


@pytest.mark.parametrize("name", BACKBONES)
def test_official_round_trip(name, tmp_path):
    """Official -> ours -> official: every tensor and every field that matters comes back."""
    theirs = peer(BACKBONES[name], tmp_path / "official", **SIZES)
    ours, report = HfMaskFormerForUniversalSegmentation.from_pretrained(
        tmp_path / "official", output_loading_info=True
    )
    assert not any(report.values()), report
    ours.save_official(tmp_path / "again", image_processor=image_processor_for(ours.config))
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "again"), Mask2FormerImageProcessor)
    before = load_file(tmp_path / "official" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    indices = {key for key in after if key.endswith("relative_position_index")}  # a buffer that old versions ask for
    assert after.keys() - indices == before.keys() - {key for key in before if key.endswith("relative_position_index")}
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)
    reloaded, report = Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    kept = {*SIZES, "mask_weight", "dice_weight", "class_weight", "no_object_weight", "id2label", "dropout"}
    for field in kept:
        assert getattr(reloaded.config, field) == getattr(theirs.config, field), field


def test_what_transformers_cannot_hold_is_refused(tmp_path):
    sizes = {"pixel_decoder_dim": 64, "query_decoder_dim": 64, "query_decoder_heads": 4}
    small = {"backbone_config": {**BACKBONES["resnet"], "out_features": STAGES}, "num_queries": 5}
    model = HfMaskFormerForUniversalSegmentation(preset("mask2former-r50", **small, **sizes))
    with pytest.raises(ValueError, match="num_attention_heads"):
        model.save_official(tmp_path)
    dense = preset("mask2former-r50", **small, criterion="dense")
    with pytest.raises(ValueError, match=r"criterion is 'dense'.*'points'"):
        HfMaskFormerForUniversalSegmentation(dense).save_official(tmp_path)


def test_untranslatable_field_is_refused():
    with pytest.raises(ValueError, match=r"pre_norm.*True"):
        HfMaskFormerConfig.from_dict({"model_type": "mask2former", "pre_norm": True})
    config = HfMaskFormerConfig.from_dict({"model_type": "mask2former", "decoder_layers": 4})
    assert (config.query_decoder_layers, config.query_decoder, config.criterion) == (3, "masked", "points")
    assert config.backbone_config.depths == [2, 2, 18, 2]


def test_layers_take_the_maps_of_their_strides_in_turn():
    torch.manual_seed(0)
    small = {"backbone_config": {**BACKBONES["resnet"], "out_features": STAGES}, "num_queries": 5}
    fields = {**small, "query_decoder_layers": 3, "query_decoder_memory_strides": [8, 32]}
    model = HfMaskFormerForUniversalSegmentation(preset("mask2former-r50", **fields)).eval()
    cells = []
    for layer in model.model.query_decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[2].shape[1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert cells == [8 * 12, 2 * 3, 8 * 12]
    with pytest.raises(ValueError, match=r"query_decoder_memory_strides is \[8, 32\].*\[32, 16, 8\]"):
        model.save_official("never")


@pytest.mark.parametrize("strides", [[], [4], [8, 64]])
def test_strides_without_a_map_are_refused(strides):
    with pytest.raises(ValueError, match="query_decoder_memory_strides must be one or more of 8, 16 and 32"):
        HfMaskFormerConfig(query_decoder="masked", query_decoder_memory_strides=strides)
