"""Swin layers with fewer copies: the same maps as transformers' own, with gradients and without."""

import pytest
import torch
from transformers import AutoBackbone, SwinConfig

from hf_maskformer.model import backbone_swin
from hf_maskformer.model.backbone import Backbone, _build_body
from hf_maskformer.model.backbone_swin import GatheringSwinLayer, window_order, window_parts

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def pair(window: int):
    """transformers' backbone and ours with the same weights; no bias is zero, so that padded cells count."""
    config = SwinConfig(
        embed_dim=8, depths=[2, 2, 2, 1], num_heads=[1, 2, 2, 4], window_size=window, out_features=STAGES
    )
    torch.manual_seed(0)
    theirs, ours = AutoBackbone.from_config(config), _build_body(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("window", [3, 4, 7])
@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 40)], ids=str)
def test_maps_equal_transformers(window, size):
    ours, theirs = pair(window)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected, maps = theirs(images).feature_maps, ours(images).feature_maps
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gather_is_used_without_gradients_only(monkeypatch):
    ours, _ = pair(4)
    calls = []
    real = GatheringSwinLayer._attend
    monkeypatch.setattr(GatheringSwinLayer, "_attend", lambda *args: calls.append(1) or real(*args))
    ours(torch.randn(1, 3, 64, 64))
    assert not calls
    with torch.no_grad():
        ours(torch.randn(1, 3, 64, 64))
    assert len(calls) == 7


def test_gradients_equal_transformers():
    ours, theirs = pair(4)
    images = torch.randn(1, 3, 40, 56)
    for model in (ours, theirs):
        sum(feature_map.square().mean() for feature_map in model(images).feature_maps).backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_cells_of_other_regions_are_hidden_without_denormal_numbers():
    """exp(-100), transformers' weight of a hidden cell, is one; the projection of such numbers is slow."""
    ours, theirs = pair(4)
    for layer, other in zip(ours.swin.encoder.layers[0].blocks, theirs.swin.encoder.layers[0].blocks, strict=True):
        mask, expected = (one.get_attn_mask(8, 12, torch.float32, torch.device("cpu")) for one in (layer, other))
        if expected is None:
            assert mask is None
            continue
        assert (expected != 0).any()
        assert torch.equal(mask, torch.where(expected == 0, 0.0, -torch.inf))


def test_window_order_by_hand():
    # A 2x3 map in windows of 2, padded to 2x4 (cell 6 is padding), rolled by one to the left and up:
    #   0 1 2 6        4 5 6 3
    #   3 4 5 6   ->   1 2 6 0
    assert window_order((2, 3), 2, 1).tolist() == [[4, 5, 1, 2], [6, 3, 6, 0]]
    assert window_order((2, 2), 2, 0).tolist() == [[0, 1, 2, 3]]


def test_window_parts_leave_padding_out():
    first, second = window_parts((2, 3), 2, 1, 1, torch.device("cpu"))
    assert (first.first, first.windows, first.cells.tolist(), first.places) == (0, 1, [4, 5, 1, 2], None)
    assert (second.first, second.windows) == (1, 1)
    assert (second.cells.tolist(), second.places.tolist()) == ([3, 0], [1, 3])
    (whole,) = window_parts((2, 3), 2, 1, 0, torch.device("cpu"))
    assert whole.windows == 2
    assert (whole.cells.tolist(), whole.places.tolist()) == ([4, 5, 1, 2, 3, 0], [0, 1, 2, 3, 5, 7])


def test_small_parts_change_nothing(monkeypatch):
    ours, _ = pair(3)
    images = torch.randn(2, 3, 41, 56)
    with torch.inference_mode():
        whole = ours(images).feature_maps
        monkeypatch.setattr(backbone_swin, "FLOATS_AT_ONCE", 1)
        parts = ours(images).feature_maps
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_autocast():
    ours, _ = pair(4)
    images = torch.randn(1, 3, 50, 64)
    with torch.no_grad():
        expected = ours(images).feature_maps
        with torch.autocast("cpu", torch.bfloat16):
            maps = ours(images).feature_maps
    for one, other in zip(maps, expected, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_outer_modules_with_hooks_are_called():
    config = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)
    backbone = Backbone(config, neck="none", neck_dim=8, freeze_batch_norm=False, num_channels=3).eval()
    calls = []
    backbone.body.swin.register_forward_hook(lambda *args: calls.append(1))
    backbone(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


def test_dropout_that_is_switched_on_works():
    """As for Monte Carlo estimates: the model in eval mode, its dropout in training mode."""
    config = SwinConfig(embed_dim=8, depths=[1], num_heads=[1], window_size=4, hidden_dropout_prob=0.5)
    backbone = _build_body(config).eval()
    images = torch.randn(1, 3, 64, 64)
    for module in backbone.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    with torch.no_grad():
        assert not torch.equal(backbone(images).feature_maps[0], backbone(images).feature_maps[0])


def test_weights_that_are_more_than_weights_are_called():
    """As PEFT's adapters are: a projection of another class, or with a hook, is not read past."""
    ours, theirs = pair(4)
    images = torch.randn(1, 3, 64, 64)
    for model in (ours, theirs):
        layer = model.swin.encoder.layers[1].blocks[0].attention
        layer.q_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        model.swin.embeddings.patch_embeddings.projection.register_forward_hook(lambda *args: args[-1] + 1)
    with torch.inference_mode():
        for one, other in zip(ours(images).feature_maps, theirs(images).feature_maps, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_maps_of_the_backbone_are_views_of_tokens():
    config = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)
    backbone = Backbone(config, neck="none", neck_dim=8, freeze_batch_norm=False, num_channels=3).eval()
    images = torch.randn(2, 3, 50, 37)
    with torch.inference_mode():
        maps, expected = backbone(images), backbone.body(images).feature_maps
    for one, other in zip(maps, expected, strict=True):
        assert one.stride(1) == 1
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
