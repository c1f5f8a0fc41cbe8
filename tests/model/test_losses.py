"""Losses against their definitions: exact values on hand-sized cases, closed gradients, sums that come in parts."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_maskformer.model import losses
from hf_maskformer.model.losses import MaskLosses, PairSums, class_loss, pairwise_mask_costs, pixel_loss

# --- losses on hand-sized cases --------------------------------------------------------------------------------------


def mask_losses(logits, targets, valid=None, *, alpha=0.25, gamma=2.0):
    """Focal and dice loss of rows of pixels (M, P), each with a target and weights of its own."""
    index = torch.arange(len(logits))
    weights = None if valid is None else valid[:, None]
    return MaskLosses.apply(logits[:, None], targets[:, None], weights, index, index, alpha, gamma)


def plain_mask_losses(logits, targets, valid, *, alpha, gamma):
    """By their definitions, on (M, P)."""
    p = logits.sigmoid()
    entropy = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits))
    agreement = p * targets + (1 - p) * (1 - targets)
    focal = (alpha * targets + (1 - alpha) * (1 - targets)) * entropy * (1 - agreement) ** gamma
    overlap, areas = (p * targets * valid).sum(1), ((p + targets) * valid).sum(1)
    return torch.stack([(focal * valid).sum(1) / valid.sum(1).clamp(min=1), 1 - (2 * overlap + 1) / (areas + 1)])


def test_focal_loss_of_an_undecided_pixel():
    # p = 0.5: CE = ln 2, (1 - p_t)^2 = 1/4; alpha 1/4 for the positive, 3/4 for the negative pixel
    loss = mask_losses(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))[0]
    assert loss.item() == pytest.approx((0.25 + 0.75) * 0.25 * math.log(2) / 2, abs=1e-7)


def test_focal_loss_leaves_out_padding():
    logits, targets = torch.tensor([[0.0, 50.0]]), torch.tensor([[1.0, 0.0]])
    loss = mask_losses(logits, targets, torch.tensor([[1.0, 0.0]]))[0]
    assert loss.item() == pytest.approx(0.25 * 0.25 * math.log(2), abs=1e-7)


def test_dice_loss_by_hand():
    # p = (0.5, 0.5), g = (1, 0): 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    loss = mask_losses(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))[1]
    assert loss.item() == pytest.approx(1 - 2 / 3, abs=1e-7)


def test_losses_of_a_perfect_and_of_an_empty_mask_are_zero():
    sure = torch.tensor([[100.0, -100.0]], requires_grad=True)
    for logits, target in ((sure, torch.tensor([[1.0, 0.0]])), (-sure.abs(), torch.zeros(1, 2))):
        losses = mask_losses(logits, target)
        assert losses.flatten().tolist() == pytest.approx([0, 0], abs=1e-6)
        assert torch.autograd.grad(losses.sum(), sure)[0].abs().max() < 1e-6


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("numbers_at_once", [1, 3 * 48, 2**17])
@pytest.mark.parametrize("kind", ["bool", "fractional", "weighted", "own size"])
def test_mask_losses_equal_their_definitions(kind, numbers_at_once, gamma, monkeypatch):
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", numbers_at_once)
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    size = (3, 4) if kind == "own size" else (6, 8)
    logits = (rand(7, 3, 4) * 12 - 6).requires_grad_()
    targets = rand(5, *size) if kind == "fractional" else rand(5, *size) > 0.5
    valid = rand(2, *size) if kind == "weighted" else None
    target, image = torch.tensor([4, 0, 0, 2, 1, 3, 4]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    found = MaskLosses.apply(logits, targets, valid, target, image, 0.25, gamma)
    resized = logits if kind == "own size" else F.interpolate(logits[:, None], size=size, mode="bilinear")[:, 0]
    weights = torch.ones(7, size[0] * size[1]).double() if valid is None else valid[image].flatten(1)
    expected = plain_mask_losses(
        resized.flatten(1), targets[target].double().flatten(1), weights, alpha=0.25, gamma=gamma
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    above = rand(2, 7)
    gradients = [torch.autograd.grad((above * value).sum(), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_pairwise_costs_equal_the_losses_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 10, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 10, dtype=torch.float64)
    valid[1, 7:] = 0
    targets = (torch.rand(2, 4, 10, generator=generator) > 0.5).double() * valid[:, None]
    focal, dice = pairwise_mask_costs(logits, targets, valid, alpha=0.25, gamma=2.0)
    for image in range(2):
        for query in range(3):
            for segment in range(4):
                pair = logits[image, query][None], targets[image, segment][None], valid[image][None]
                expected = plain_mask_losses(*pair, alpha=0.25, gamma=2.0).flatten().tolist()
                found = [focal[image, query, segment].item(), dice[image, query, segment].item()]
                assert found == pytest.approx(expected, abs=1e-12)


def test_class_loss_weighs_no_object():
    logits = torch.zeros(1, 2, 3)
    loss = class_loss(logits, torch.tensor([[0, 2]]), no_object_weight=0.1)
    assert loss.tolist() == [pytest.approx([math.log(3), 0.1 * math.log(3)], abs=1e-6)]


def test_pixel_loss_averages_each_image_over_its_labelled_pixels():
    logits = torch.zeros(2, 4, 1, 3)
    labels = torch.tensor([[[0, -1, 2]], [[-1, -1, -1]]])
    assert pixel_loss(logits, labels).tolist() == pytest.approx([math.log(4), 0.0])


# --- sums of pairs ---------------------------------------------------------------------------------------------------


def pair_costs(logits: Tensor, targets: Tensor, chunks: list[int]) -> tuple[Tensor, Tensor]:
    """Of the logits as products of unit queries with embeddings."""
    sums = PairSums(torch.eye(len(logits), dtype=logits.dtype), len(targets))
    for some, wanted in zip(logits.split(chunks, 1), targets.split(chunks, 1), strict=True):
        sums.add(some, wanted)
    return sums.costs(logits.shape[1])


def direct_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of every pair, by their definitions: (R, N) each."""
    x, t = logits[:, None], targets[None]
    bce = (x.clamp(min=0) - x * t + torch.log1p(torch.exp(-x.abs()))).mean(-1)
    p = 1 / (1 + torch.exp(-x))
    return bce, 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


@pytest.mark.parametrize("chunks", [[200], [64, 128, 8], [1, 63, 65, 71], [77, 123], [1] * 200], ids=len)
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_pair_sums_are_cross_entropy_and_dice_however_the_points_come(scale, chunks):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(5, 200, generator=generator, dtype=torch.float64).clamp(-1, 1)
    if scale == 200:
        logits = 200 * logits.sign()  # as sure as a float can be, rightly and wrongly
    targets = torch.rand(3, 200, generator=generator, dtype=torch.float64)
    targets[:2] = targets[:2].round()
    for cost, expected in zip(pair_costs(logits, targets, chunks), direct_costs(logits, targets), strict=True):
        assert cost.shape == (5, 3)
        assert cost.isfinite().all()
        torch.testing.assert_close(cost, expected, atol=1e-12, rtol=1e-12)


def test_pair_sums_by_hand():
    exact = partial(torch.tensor, dtype=torch.float64)
    logits = exact([[0.0, np.log(3.0)]])  # probabilities 1/2 and 3/4
    bce, dice = pair_costs(logits, exact([[1.0, 0.0], [0.0, 0.0]]), [1, 1])
    torch.testing.assert_close(bce, exact([[np.log(8) / 2, np.log(8) / 2]]), atol=1e-12, rtol=0)
    torch.testing.assert_close(dice, exact([[1 - 2 / 3.25, 1 - 1 / 2.25]]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("points", [64, 127, 512])
def test_pair_sums_in_float32_where_products_are_smallest(points):
    """At logits of 0 every factor of a product is one half."""
    bce, dice = pair_costs(torch.zeros(2, points), torch.ones(1, points), [points])
    torch.testing.assert_close(bce, torch.full((2, 1), float(np.log(2))), atol=1e-6, rtol=0)
    torch.testing.assert_close(dice, torch.full((2, 1), 1 - (points + 1) / (1.5 * points + 1)), atol=1e-6, rtol=0)


# --- losses at points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers_at_once", [1, 40, 2**17])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_point_losses_are_cross_entropy_and_dice(numbers_at_once, scale, monkeypatch):
    monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", numbers_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(7, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    wanted = torch.rand(7, 12, generator=generator, dtype=torch.float64)
    wanted[:4] = wanted[:4].round()
    weights = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    found = losses.PointLosses.apply(logits, wanted)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    p = logits.sigmoid()
    expected = torch.stack([bce, 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((weights * value).sum(), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_point_losses_of_nothing():
    logits = torch.zeros(0, 5, requires_grad=True)
    found = losses.PointLosses.apply(logits, torch.zeros(0, 5))
    assert found.shape == (2, 0)
    assert torch.autograd.grad(found.sum(), logits)[0].shape == (0, 5)
