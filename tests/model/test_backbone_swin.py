"""Swin layers with fewer copies: the same maps as transformers' own, with gradients and without."""

import pytest
import torch
from transformers import AutoBackbone, SwinConfig

from hf_maskformer.model.backbone import _build_body
from hf_maskformer.model.backbone_swin import GatheringSwinLayer, RowwiseSwinMLP, window_order

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
    assert sum(isinstance(module, RowwiseSwinMLP) for module in ours.modules()) == 7


def test_gradients_equal_transformers():
    ours, theirs = pair(4)
    images = torch.randn(1, 3, 40, 56)
    for model in (ours, theirs):
        sum(feature_map.square().mean() for feature_map in model(images).feature_maps).backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_window_order_by_hand():
    # A 2x3 map in windows of 2, padded to 2x4 (cell 6 is padding), rolled by one to the left and up:
    #   0 1 2 6        4 5 6 3
    #   3 4 5 6   ->   1 2 6 0
    cells, places = window_order((2, 3), 2, 1, device=torch.device("cpu"))
    assert cells.tolist() == [4, 5, 1, 2, 6, 3, 6, 0]
    assert places.tolist() == [7, 2, 3, 5, 0, 1]
    cells, places = window_order((2, 2), 2, 0, device=torch.device("cpu"))
    assert cells.tolist() == places.tolist() == [0, 1, 2, 3]
