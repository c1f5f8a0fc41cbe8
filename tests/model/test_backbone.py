"""Backbones of every kind: maps and strides, pyramid neck, frozen batch norms, checkpointing, files; no network."""

import math
import socket

import pytest
import torch
from transformers import ConvNextConfig, Dinov2Config, PvtV2Config, ResNetConfig, SwinConfig

from hf_maskformer.model.backbone import Backbone
from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation, build_backbone
from hf_maskformer.training.train import checkpoint_activations
from model import variant_tester as tester

STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "layer_type": "basic"}
PVT = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "sr_ratios": [8, 4, 2, 1],
}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
TRANSFORMERS = {
    "resnet": ResNetConfig(**RESNET, out_features=STAGES),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES),
    "convnext": ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], out_features=STAGES),
    "pvt_v2": PvtV2Config(**PVT, out_features=STAGES),
    "dinov2": Dinov2Config(**DINO, patch_size=16, out_features=["stage2"]),
    "dinov2-14": Dinov2Config(**DINO, patch_size=14, out_features=["stage1", "stage2"]),
}
TIMM = ["timm/resnet18", "timm/mobilenetv3_small_050", "timm/convnext_atto"]
EVERY = [*TRANSFORMERS, *TIMM]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A look at the Hub is an error, and not only a slow test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a backbone tried to reach the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def fields(name: str, **overrides) -> dict:
    source = {"backbone": name} if name.startswith("timm/") else {"backbone_config": TRANSFORMERS[name].to_dict()}
    if "num_channels" in overrides and "backbone_config" in source:
        source["backbone_config"]["num_channels"] = overrides["num_channels"]
    return {**source, **tester.TINY, **overrides}


def config(name: str, **overrides) -> HfMaskFormerConfig:
    return HfMaskFormerConfig(**fields(name, **overrides))


def small_backbone(backbone_config, **settings) -> Backbone:
    defaults = {"neck": "auto", "neck_dim": 16, "freeze_batch_norm": False, "num_channels": 3}
    return Backbone(backbone_config, **{**defaults, **settings})


# --- maps and strides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_maps_have_the_published_channels_and_strides(name):
    backbone = build_backbone(config(name)).eval()
    assert backbone.strides == [4, 8, 16, 32]
    for height, width in ((64, 96), (65, 97), (63, 50)):
        maps = backbone(torch.randn(2, 3, height, width))
        expected = [
            (2, channels, math.ceil(height / stride), math.ceil(width / stride))
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]
        assert [tuple(feature_map.shape) for feature_map in maps] == expected


@pytest.mark.parametrize("name", EVERY)
def test_the_last_rows_and_columns_are_seen(name):
    """Patches of ConvNeXt and ViT drop what they do not divide: the image is padded for them, never cropped."""
    backbone = build_backbone(config(name)).eval()
    image = torch.zeros(1, 3, 71, 71)
    changed = image.clone()
    changed[:, :, -1], changed[..., -1] = 50.0, 50.0
    with torch.no_grad():
        difference = (backbone(image)[0] - backbone(changed)[0]).abs()
    assert difference[0, :, -1, 0].max() > 1e-4
    assert difference[0, :, 0, -1].max() > 1e-4


@pytest.mark.parametrize(("name", "multiple"), [("resnet", 1), ("swin", 1), ("convnext", 32), ("dinov2-14", 14)])
def test_only_backbones_that_drop_pixels_get_padded_images(name, multiple):
    assert build_backbone(config(name)).pad_multiple == multiple


@pytest.mark.parametrize("name", EVERY)
def test_every_backbone_trains(name):
    model = tester.build(config(name)).train()
    tester.assert_trained(model, tester.batch(model.config))
    tester.assert_trained(model, tester.batch(model.config, size=(70, 98)))


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet", "swin", "timm/resnet18"])
def test_other_numbers_of_channels(name, num_channels):
    model = tester.build(config(name, num_channels=num_channels)).train()
    tester.assert_trained(model, tester.batch(model.config))
    with pytest.raises(ValueError, match=rf"pixel_values must be \(B, {num_channels}, H, W\), got \(1, 3, 64, 64\)"):
        model(torch.zeros(1, 3, 64, 64))


# --- wrong strides, the neck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone_config", "strides"),
    [
        (ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]), r"\[8, 16, 32\]"),
        (ResNetConfig(**RESNET, out_features=["stem", *STAGES[:3]]), r"\[4, 4, 8, 16\]"),
        (ResNetConfig(**RESNET, out_features=STAGES, downsample_in_first_stage=True), r"\[8, 16, 32, 64\]"),
    ],
)
def test_wrong_strides_are_refused_and_named(backbone_config, strides):
    with pytest.raises(ValueError, match=rf"resnet gives maps with strides {strides}; needed are \[4, 8, 16, 32\]"):
        small_backbone(backbone_config)


def test_a_plain_transformer_without_neck_is_refused():
    with pytest.raises(ValueError, match=r"strides \[16\]; needed .* backbone_neck='pyramid'"):
        small_backbone(TRANSFORMERS["dinov2"], neck="none")


def test_a_neck_on_a_pyramid_is_refused():
    with pytest.raises(
        ValueError, match=r"'pyramid' needs one common stride; resnet has the strides \[4, 8, 16, 32\]"
    ):
        small_backbone(TRANSFORMERS["resnet"], neck="pyramid")


def test_wrong_timm_levels_are_refused():
    timm_config = config("timm/resnet18").backbone_config
    timm_config.out_indices = [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"Backbone resnet18 gives maps with strides \[2, 4, 8, 16\]"):
        small_backbone(timm_config)


def test_timm_models_of_one_input_size_are_refused():
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        with pytest.raises(ValueError, match=rf"timm/{name} takes images of \(224, 224\) only"):
            build_backbone(config(f"timm/{name}"))


def test_an_unknown_timm_model_is_refused():
    with pytest.raises(ValueError, match="timm has no model 'resnet_1_8'"):
        build_backbone(config("timm/resnet_1_8"))


def test_timm_names_may_carry_the_tag_of_their_weights():
    assert build_backbone(config("timm/resnet18.a1_in1k")).channels == [64, 128, 256, 512]


def test_strides_are_measured_without_memory():
    """On the meta device, as `from_pretrained` builds a model."""
    with torch.device("meta"):
        backbone = build_backbone(config("swin"))
    assert backbone.strides == [4, 8, 16, 32]
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}


# --- what is frozen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "timm/resnet18"])
def test_frozen_batch_norms_stay_in_eval_mode_without_gradient(name, tmp_path):
    model = tester.build(config(name, backbone_freeze_batch_norm=True)).train()
    model.save_pretrained(tmp_path)
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path)
    for candidate in (model, loaded.train()):
        norms = [m for m in candidate.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        before = [norm.running_mean.clone() for norm in norms]
        candidate(**tester.batch(candidate.config)).loss.backward()
        assert not any(norm.training for norm in norms)
        assert all(norm.weight.grad is None and norm.bias.grad is None for norm in norms)
        assert all(torch.equal(old, norm.running_mean) for old, norm in zip(before, norms, strict=True))
        assert candidate.training
        assert candidate.model.backbone.training


def test_batch_norms_train_by_default():
    model = tester.build(config("resnet")).train()
    norms = [m for m in model.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(**tester.batch(model.config)).loss.backward()
    assert all(norm.training and norm.weight.grad is not None for norm in norms)
    assert not any(torch.equal(old, norm.running_mean) for old, norm in zip(before, norms, strict=True))


def test_parameters_that_no_map_depends_on_are_frozen(tmp_path):
    """DistributedDataParallel waits for the gradient of every trainable parameter."""
    backbone = small_backbone(TRANSFORMERS["dinov2"])
    assert backbone.idle_parameters == ["embeddings.mask_token"]
    assert not backbone.body.embeddings.mask_token.requires_grad
    assert small_backbone(TRANSFORMERS["resnet"]).idle_parameters == []
    model = tester.build(config("dinov2"))
    model.save_pretrained(tmp_path)
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert tester.frozen(loaded) == tester.frozen(model) == {"model.backbone.body.embeddings.mask_token"}


# --- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((name, False) for name in EVERY), ("resnet", True), ("convnext", True), ("timm/resnet18", True)],
)
def test_gradient_checkpointing(name, reentrant):
    """Same gradients, and the backbone really runs twice, with both kinds of torch's checkpointing."""
    model = tester.build(config(name)).train()
    inputs = tester.batch(model.config)
    expected = tester.gradients(model, inputs)
    checkpoint_activations(model, use_reentrant=reentrant)
    calls = tester.count_calls(model.model.backbone.body)
    actual = tester.gradients(model, inputs)
    tester.assert_same_gradients(actual, expected)
    again = [module for module, count in calls.items() if count > 1]
    # timm leaves the stem and the last stage alone.
    assert len(again) >= (0.4 if name.startswith("timm/") else 0.8) * len(calls), calls


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_save_and_load(name, tmp_path):
    tester.check_save_and_load(config(name, num_channels=3), tmp_path)


def test_a_timm_model_is_rebuilt_from_its_file_alone(tmp_path):
    model = tester.build(config("timm/resnet18", num_channels=4)).eval()
    model.save_pretrained(tmp_path)
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert loaded.config.backbone is None
    assert loaded.config.backbone_config.backbone == "resnet18"
    assert loaded.config.backbone_config.num_channels == 4
    again = HfMaskFormerConfig.from_dict(loaded.config.to_dict())
    assert tester.build(again).config.to_dict() == loaded.config.to_dict()
