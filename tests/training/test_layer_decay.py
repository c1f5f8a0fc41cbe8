"""Depths read from the parameter names of real backbones, and the groups they give."""

import pytest
import torch
from transformers import AutoBackbone, ConvNextConfig, Dinov2Config, PvtV2Config, ResNetConfig, SwinConfig

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import preset
from hf_maskformer.training.layer_decay import layer_scales
from hf_maskformer.training.optimizer import parameter_groups

STAGES = {"depths": [1, 1, 2, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
# Depths of names that begin so; five blocks: 0 stem, 1-5 blocks, 6 output. The first that fits counts.
DEPTHS = {
    "resnet": {
        "embedder.": 0,
        "encoder.stages.0.": 1,
        "encoder.stages.1.": 2,
        "encoder.stages.2.layers.0.": 3,
        "encoder.stages.2.layers.1.": 4,
        "encoder.stages.3.": 5,
    },
    "swin": {
        "swin.embeddings.": 0,
        "swin.encoder.layers.0.": 1,
        "swin.encoder.layers.1.": 2,
        "swin.encoder.layers.2.blocks.0.": 3,
        "swin.encoder.layers.2.": 4,  # and the merging of patches after it
        "swin.encoder.layers.3.": 5,
        "swin.layernorm.": 6,
        "hidden_states_norms.": 6,
    },
    "convnext": {
        "embeddings.": 0,
        "encoder.stages.0.": 1,
        "encoder.stages.1.": 2,
        "encoder.stages.2.layers.1.": 4,
        "encoder.stages.2.": 3,  # and the downsampling before it
        "encoder.stages.3.": 5,
        "hidden_states_norms.": 6,
    },
    "pvt_v2": {
        "encoder.layers.0.": 1,
        "encoder.layers.1.": 2,
        "encoder.layers.2.patch_embedding.": 3,
        "encoder.layers.2.blocks.0.": 3,
        "encoder.layers.2.": 4,
        "encoder.layers.3.": 5,
    },
}
CONFIGS = {
    "resnet": ResNetConfig(**STAGES),
    "swin": SwinConfig(embed_dim=24, **STAGES),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8, 16, 16], **STAGES),
    "pvt_v2": PvtV2Config(**STAGES),
}


def names_of(config):
    with torch.device("meta"):
        return [name for name, _ in AutoBackbone.from_config(config).named_parameters()]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_depths_of_every_parameter(kind):
    names = names_of(CONFIGS[kind])
    depths = {name: next(d for prefix, d in DEPTHS[kind].items() if name.startswith(prefix)) for name in names}
    assert set(depths.values()) >= {1, 2, 3, 4, 5}
    assert layer_scales(names, 0.5) == {name: 0.5 ** (6 - depth) for name, depth in depths.items()}


def test_timm_names():
    resnet = ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.1.bn1.bias", "layer2.0.downsample.0.weight"]
    assert list(layer_scales(["_backbone." + name for name in resnet], 0.5).values()) == [
        1 / 16,
        1 / 16,
        1 / 8,
        0.25,
        0.5,
    ]
    convnext = [
        "stem_0.weight",
        "stages_0.blocks.0.gamma",
        "stages_1.downsample.0.bias",
        "stages_1.blocks.0.norm.bias",
    ]
    assert list(layer_scales(convnext, 0.5).values()) == [1 / 8, 0.25, 0.5, 0.5]


def test_a_backbone_without_stages_is_refused():
    config = Dinov2Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"layer_decay: the depth of .*embeddings.* cannot be told .*ResNet, Swin"):
        layer_scales(names_of(config), 0.5)


def test_an_unknown_part_of_a_known_backbone_is_refused():
    with pytest.raises(ValueError, match=r"parameter adapter\.weight cannot be told"):
        layer_scales(["encoder.stages.0.layers.0.weight", "adapter.weight"], 0.5)


def test_rates_of_a_whole_model():
    with torch.device("meta"):
        model = HfMaskFormerForUniversalSegmentation(preset("maskformer-swin-tiny"))
    settings = {"learning_rate": 1.0, "backbone_multiplier": 0.5, "weight_decay": 0.1}
    plain = {name: group for group in parameter_groups(model, **settings) for name in group["parameter_names"]}
    groups = parameter_groups(model, layer_decay=0.5, **settings)
    split = {name: group for group in groups for name in group["parameter_names"]}
    assert set(split) == set(plain)
    assert all(split[name]["weight_decay"] == plain[name]["weight_decay"] for name in plain)
    rest = [name for name in split if not name.startswith("model.backbone.")]
    assert {split[name]["lr"] for name in rest} == {1.0}
    backbone = sorted({split[name]["lr"] for name in split if name not in rest})
    assert backbone == [0.5 * 0.5**n for n in range(13, -1, -1)]  # stem, 12 blocks, norms
