"""Reading at points, which points are drawn and chosen, and which cells of a map hold image: exact values."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_maskformer.model import point_sampling
from hf_maskformer.model.point_sampling import PointSource, most_uncertain, sample_maps, sample_targets, valid_cells


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    """(M, C, h, w) maps, each at its own (M, P, 2) points, one map after the other: (M, C, P)."""
    read = [
        F.grid_sample(one[None], 2 * own[None, None] - 1, align_corners=False)[0, :, 0]
        for one, own in zip(maps, points, strict=True)
    ]
    return torch.stack(read)


# --- reading ---------------------------------------------------------------------------------------------------------

CELLS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)  # (2, 3)
# A centre, the middle of the map, half way to a neighbour, its upper left corner, and outside.
BY_HAND = {
    (1 / 6, 0.25): 1.0,
    (0.5, 0.5): 3.5,
    (1 / 3, 0.25): 1.5,
    (0.0, 0.0): 0.25,
    (1.0, 0.75): 3.0,
    (1.2, 0.5): 0.0,
}


def test_maps_by_hand():
    points = torch.tensor(list(BY_HAND), dtype=torch.float64)[None]
    kept = points.clone()
    read = sample_maps(torch.stack([CELLS, 10 * CELLS])[None], points)
    expected = torch.tensor(list(BY_HAND.values()), dtype=torch.float64)
    torch.testing.assert_close(read, torch.stack([expected, 10 * expected])[None], atol=1e-12, rtol=0)
    assert torch.equal(points, kept)  # the caller's points are left as they are


def test_maps_equal_grid_sample():
    maps, points = random(3, 2, 5, 7) - 0.5, random(3, 11, 2, seed=1) * 1.4 - 0.2
    torch.testing.assert_close(sample_maps(maps, points), by_grid_sample(maps, points), atol=1e-12, rtol=0)
    small = points.float()  # points are drawn in float32, whatever the maps are
    torch.testing.assert_close(sample_maps(maps, small), by_grid_sample(maps, small.double()), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda maps: sample_maps(maps, points), maps.requires_grad_())


def test_targets_by_hand():
    masks = torch.stack([CELLS > 3, CELLS < 2])
    points = torch.tensor([[[1 / 3, 0.5], [0.5, 0.75]], [[1 / 6, 0.25], [1 / 3, 0.25]]])
    read = sample_targets(masks, points[[1, 0, 1]], np.array([1, 0, 0]))
    assert read.dtype == points.dtype
    torch.testing.assert_close(read, torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.0, 0.0]]), atol=1e-6, rtol=0)


# Rows of each target: none, one or several; in no order.
READERS = np.array([4, 1, 4, 0, 6, 4, 1, 4])


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("masks_at_once", [0, 1, 2, 3, 100])
def test_targets_equal_grid_sample_however_many_are_converted_at_once(masks_at_once, kind, monkeypatch):
    masks, points = random(7, 6, 9), random(len(READERS), 13, 2, seed=1) * 1.2 - 0.1
    masks = masks if kind.is_floating_point else masks > 0.5
    masks = masks.to(kind)
    taken = []

    def counted(maps: Tensor, points: Tensor) -> Tensor:
        taken.append(len(maps))
        return sample_maps(maps, points)

    monkeypatch.setattr(point_sampling, "sample_maps", counted)
    monkeypatch.setattr(point_sampling, "PIXELS_PER_POINT", 1000)
    monkeypatch.setitem(point_sampling.PIXELS_AT_ONCE, "cpu", masks_at_once * 6 * 9 + 5)
    read = sample_targets(masks, points, READERS)
    expected = by_grid_sample(masks[READERS, None].double(), points)[:, 0]
    torch.testing.assert_close(read, expected, atol=1e-12, rtol=0)
    assert sum(taken) == 4  # every target that is read is converted once
    assert max(taken) == min(max(masks_at_once, 1), 4)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [(1, 1), (1, 8), (5, 1), (33, 20), (384, 384)])
def test_bytes_equal_grid_sample_at_every_place(kind, size, monkeypatch):
    """Within, on the border, far outside; points in float32 as they are drawn; masks that are a view of others."""
    monkeypatch.setattr(point_sampling, "PIXELS_PER_POINT", 0)
    monkeypatch.setattr(point_sampling, "sample_maps", None)
    masks = (random(6, 3, *size) > 0.5).to(kind)[:, 1]
    points = torch.cat([random(6, 200, 2, seed=1, dtype=torch.float32), random(6, 50, 2, seed=2).float() * 8 - 4], 1)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    read = sample_targets(masks, points, np.arange(6)[::-1])
    expected = by_grid_sample(masks.flip(0)[:, None].double(), points.double())[:, 0]
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.double(), expected, atol=1e-4, rtol=0)
    inside = slice(4, 200)
    converted = by_grid_sample(masks.flip(0)[:, None].float(), points)[:, 0]
    last_bit = max(size) * torch.finfo(torch.float32).eps  # of a place in pixels
    torch.testing.assert_close(read[:, inside], converted[:, inside], atol=max(1e-6, last_bit), rtol=0)


def test_nothing_to_read():
    points = torch.zeros(0, 5, 2)
    nothing = np.zeros(0, dtype=np.int64)
    assert sample_targets(torch.zeros(3, 4, 4), points, nothing).shape == (0, 5)
    assert sample_targets(torch.zeros(0, 4, 4, dtype=torch.bool), points, nothing).shape == (0, 5)


# --- choosing --------------------------------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor that says that it lies on another device."""

    device = torch.device("cuda")


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("kind", [Tensor, Elsewhere])
def test_the_smallest_logits_are_chosen(kind, count):
    order = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    signs = torch.where(random(3, 20) < 0.5, -1.0, 1.0)
    logits = ((order + 1) * signs).float().as_subclass(kind)  # magnitudes 1..20, each once
    chosen = most_uncertain(logits, count).as_subclass(Tensor)
    assert chosen.shape == (3, count)
    assert order.gather(1, chosen).sort(1).values.tolist() == [list(range(count))] * 3


# --- drawing ---------------------------------------------------------------------------------------------------------

EXTENTS = torch.tensor([[0.5, 1.0], [1.0, 0.25], [0.75, 0.75]])  # height, width


def test_points_lie_all_over_the_image_and_nowhere_else():
    for seeds in ([3, 4, 5], None):
        torch.manual_seed(0)
        source = PointSource(EXTENTS, seeds)
        for image, (height, width) in enumerate(EXTENTS.tolist()):
            points = source.draw(image, 4, 500)
            assert points.shape == (4, 500, 2)
            assert points.dtype == torch.float32
            within = points / torch.tensor([width, height])
            assert within.min() >= 0
            assert within.max() <= 1
            assert (within.mean((0, 1)) - 0.5).abs().max() < 0.03
            assert within.amax((0, 1)).min() > 0.99


def test_a_seed_says_the_points_whatever_lies_beside_the_image():
    together, alone = PointSource(EXTENTS, torch.tensor([7, 8, 9])), PointSource(EXTENTS[1:2], [8])
    together.draw(0, 3, 10)
    first = together.draw(1, 3, 10)
    together.draw(2, 1, 50)
    second = together.draw(1, 2, 10)
    assert torch.equal(alone.draw(0, 3, 10), first)
    assert torch.equal(alone.draw(0, 2, 10), second)
    assert not torch.equal(first[:2], second)  # the points of a later draw are new ones
    assert not torch.equal(PointSource(EXTENTS[1:2], [9]).draw(0, 3, 10), first)
    # in one draw or in several
    assert torch.equal(PointSource(EXTENTS[1:2], [8]).draw(0, 5, 10), torch.cat([first, second]))
    torch.manual_seed(1)
    assert torch.equal(PointSource(EXTENTS[1:2], [8]).draw(0, 3, 10), first)


def test_without_seeds_the_points_are_of_the_global_generator():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(PointSource(EXTENTS, None).draw(2, 2, 9))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("seeds", [[1, 2], torch.arange(4)])
def test_every_image_needs_a_seed(seeds):
    with pytest.raises(ValueError, match=f"3 images need as many point_seeds, got {len(seeds)}"):
        PointSource(EXTENTS, seeds)


# --- the image's part of a map ---------------------------------------------------------------------------------------


def test_cells_with_any_valid_pixel_are_valid():
    valid = torch.zeros(3, 8, 12, dtype=torch.bool)
    valid[0] = True
    valid[1, :4, :5] = True  # exactly one of two rows; five of twelve columns reach into the second of three
    valid[2, :5, :4] = True
    cells, extents = valid_cells(valid, (2, 3))
    expected = [
        [[True, True, True], [True, True, True]],
        [[True, True, False], [False, False, False]],
        [[True, False, False], [True, False, False]],
    ]
    assert cells.tolist() == expected
    torch.testing.assert_close(extents, torch.tensor([[1.0, 1.0], [0.5, 5 / 12], [5 / 8, 1 / 3]]))


@pytest.mark.parametrize("stride", [1, 4])
def test_an_image_of_whole_cells_is_no_cell_larger(stride):
    """Whatever the rounding of the share of the canvas: 7 of 13 cells are 7."""
    for size in range(1, 60):
        counts = torch.arange(1, size + 1)
        rows = torch.arange(size * stride) < counts[:, None] * stride  # (B, H)
        for valid, of_map in ((rows[:, :, None], (size, 1)), (rows[:, None], (1, size))):
            cells, _ = valid_cells(valid, of_map)
            assert cells.sum((1, 2)).tolist() == counts.tolist(), size
