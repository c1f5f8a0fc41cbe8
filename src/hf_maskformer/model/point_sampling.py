"""Points instead of whole masks (PointRend, Kirillov et al. 2020; Mask2Former, sec. 3.3.2).

Points are x, y in 0..1 of the padded canvas. Values are read bilinearly; what lies outside of a map is zero, as in
`F.grid_sample(align_corners=False)`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels of target masks that are converted at one time.
PIXELS_AT_ONCE = {"cpu": 2**19}
PIXELS_ELSEWHERE = 2**25
PIXELS_PER_POINT = 8  # converting so many takes as long as what a point costs more when it is read among bytes


class PointSource:
    """Uniform random points within the image part of each canvas.

    With one seed for each image the points of an image do not depend on the images beside it, nor on the process that
    it lies on (invariant over batch splits); without seeds they come from torch's global generator.
    """

    def __init__(self, extents: Tensor, seeds: Sequence[int] | Tensor | None) -> None:
        """`extents` (B, 2): the part of the canvas's height and width that is image."""
        self.scales = extents.flip(-1)  # (B, 2) x and y
        self.generators: list[torch.Generator | None] = [None] * len(extents)
        if seeds is not None:
            if len(seeds) != len(extents):
                raise ValueError(f"{len(extents)} images need as many point_seeds, got {len(seeds)}.")
            self.generators = [
                torch.Generator(device=extents.device).manual_seed(int(seed))
                for seed in torch.as_tensor(seeds).tolist()
            ]

    def draw(self, image: int, masks: int, count: int) -> Tensor:
        """`count` points for each of `masks` masks of an image: (masks, count, 2) float32."""
        device = self.scales.device
        points = torch.rand((masks, count, 2), generator=self.generators[image], device=device, dtype=torch.float32)
        return points.mul_(self.scales[image])


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Values of (M, C, h, w) maps at (M, P, 2) points of their own: (M, C, P), differentiable in the maps."""
    grid = (2 * points.to(maps.dtype)).sub_(1)[:, None]  # (M, 1, P, 2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def sample_targets(masks: Tensor, points: Tensor, target: np.ndarray) -> Tensor:
    """Values of target masks at points, one mask and its own points a row.

    On the CPU, masks of bytes are read where they stand if they are large for the number of points. Otherwise masks
    are converted to the dtype of the points, once however many rows read them, and only a few at a time.

    Args:
        masks: (T, H, W) bool, uint8 or float.
        points: (R, P, 2).
        target: (R,) index of each row's mask; any order, repeated at will.

    Returns:
        (R, P) in the dtype of the points.
    """
    reads_bytes = masks.device.type == "cpu" and masks.dtype in (torch.bool, torch.uint8)
    if reads_bytes and points[..., 0].numel() * PIXELS_PER_POINT < masks.numel():
        return _sample_bytes(masks, points, target)
    values = points.new_empty(points.shape[:2])
    different, rank, readers = np.unique(target, return_inverse=True, return_counts=True)
    order = np.argsort(rank, kind="stable")
    starts = np.cumsum(readers) - readers
    at_once = max(PIXELS_AT_ONCE.get(masks.device.type, PIXELS_ELSEWHERE) // (masks.shape[1] * masks.shape[2]), 1)
    for start in range(0, len(different), at_once):
        some = slice(start, start + at_once)
        rows = order[starts[start] : starts[start] + readers[some].sum()]  # of `points`, grouped by target
        slots = np.arange(len(rows)) - np.repeat(starts[some] - starts[start], readers[some])
        row, group, slot, chosen = (
            torch.from_numpy(index).to(masks.device) for index in (rows, rank[rows] - start, slots, different[some])
        )
        grouped = points.new_zeros((len(chosen), int(readers[some].max()), *points.shape[1:]))
        grouped[group, slot] = points[row]  # (t, r, P, 2)
        found = sample_maps(masks[chosen, None].to(points.dtype), grouped.flatten(1, 2))  # (t, 1, r * P)
        values[row] = found.view(grouped.shape[:3])[group, slot]
    return values


def _sample_bytes(masks: Tensor, points: Tensor, target: np.ndarray) -> Tensor:
    """As `sample_targets`: the four pixels around a point are all that is read of a mask.

    2 to 5 times as fast as converting masks of 384x384 to 1024x1024 for 12544 points each (1 thread).
    """
    height, width = masks.shape[1:]
    pixels = masks.view(torch.uint8).numpy().reshape(len(masks), height * width)
    places = points.detach().numpy()
    values = np.empty(places.shape[:2], dtype=places.dtype)
    for row, index in enumerate(target.tolist()):
        left, right, left_share, right_share = _neighbours(places[row, :, 0], width)
        above, below, upper_share, lower_share = _neighbours(places[row, :, 1], height)
        mask, above, below = pixels[index], above * width, below * width
        upper = mask.take(above + left) * left_share + mask.take(above + right) * right_share
        lower = mask.take(below + left) * left_share + mask.take(below + right) * right_share
        values[row] = upper * upper_share + lower * lower_share
    return torch.from_numpy(values)


def _neighbours(places: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """The pixel before and the one after each place (P,) of a side, and the share of each: 0 beyond the side."""
    positions = places * length - 0.5
    floors = np.floor(positions)
    after_share = positions - floors
    before = floors.astype(np.int32)
    after = before + 1
    # As unsigned numbers the negative ones are large, too.
    before_share = (1 - after_share) * (before.view(np.uint32) < length)
    after_share *= after.view(np.uint32) < length
    return before.clip(0, length - 1), after.clip(0, length - 1), before_share, after_share


def most_uncertain(logits: Tensor, count: int) -> Tensor:
    """Of each row of logits (M, C) the places of the `count` that are nearest to 0: (M, count) int64."""
    certainty = logits.abs()
    if logits.device.type == "cpu":  # several times as fast as torch's topk there
        return torch.from_numpy(np.argpartition(certainty.numpy(), count - 1, axis=1)[:, :count])
    return certainty.topk(count, dim=1, largest=False, sorted=False).indices


def valid_cells(valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From valid pixels (B, H, W): valid cells (B, h, w) of a map, and the image part of height and width (B, 2).

    A cell that holds any valid pixel is valid; the image stands in the top left corner.
    """
    rows, columns = valid.any(2).sum(1), valid.any(1).sum(1)  # (B,) pixels
    extents = torch.stack([rows / valid.shape[1], columns / valid.shape[2]], 1)  # (B, 2)
    sides = torch.tensor(valid.shape[1:], device=valid.device)
    pixels = torch.stack([rows, columns], 1)  # (B, 2)
    cells = (pixels * torch.tensor(size, device=valid.device) + sides - 1) // sides  # (B, 2) rounded up, exactly
    row = torch.arange(size[0], device=valid.device)[:, None]
    column = torch.arange(size[1], device=valid.device)
    return (row < cells[:, :1, None]) & (column < cells[:, 1:, None]), extents
