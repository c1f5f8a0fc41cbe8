"""Points instead of whole masks (PointRend, Kirillov et al. 2020; Mask2Former, sec. 3.3.2).

Points are x, y in 0..1 of the padded canvas. Values are read bilinearly; what lies outside of a map is zero, as in
`F.grid_sample(align_corners=False)`.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
        return points * self.scales[image]


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Values of (M, C, h, w) maps at (M, P, 2) points of their own: (M, C, P), differentiable in the maps."""
    grid = (2 * points.to(maps.dtype) - 1)[:, None]  # (M, 1, P, 2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def sample_targets(masks: Tensor, points: Tensor, image: Tensor, segment: Tensor) -> Tensor:
    """Values of chosen target masks at points of their own, without a copy of the masks.

    Args:
        masks: (B, N, H, W) bool, uint8 or float.
        points: (M, P, 2).
        image, segment: (M, 1) each, or (M, P): which mask.

    Returns:
        (M, P) in the dtype of the points.
    """
    height, width = masks.shape[-2:]
    total = torch.zeros(points.shape[:-1], dtype=points.dtype, device=points.device)
    for row, column, share in _corners(points, height, width):
        total += masks[image, segment, row, column].to(points.dtype) * share
    return total


def sample_all_targets(masks: Tensor, points: Tensor) -> Tensor:
    """Values of all (B, N, H, W) target masks at the (B, P, 2) points of their image: (B, N, P)."""
    images, most = masks.shape[:2]
    image = torch.arange(images, device=masks.device)[:, None, None]
    segment = torch.arange(most, device=masks.device)[None, :, None]
    total = torch.zeros((images, most, points.shape[1]), dtype=points.dtype, device=points.device)
    for row, column, share in _corners(points, *masks.shape[-2:]):
        total += masks[image, segment, row[:, None], column[:, None]].to(points.dtype) * share[:, None]
    return total


def _corners(points: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The four cells around each point: row, column (int64, inside the map) and bilinear share, 0 outside of it."""
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    for down in (0, 1):
        for across in (0, 1):
            row, column = top + down, left + across
            vertical = y - top if down else 1 - (y - top)
            horizontal = x - left if across else 1 - (x - left)
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            yield (
                row.clamp(0, height - 1).long(),
                column.clamp(0, width - 1).long(),
                vertical * horizontal * inside,
            )


def most_uncertain(logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Of each mask's candidate points (M, C, 2) the `count` whose logits (M, C) are nearest to 0: (M, count, 2)."""
    chosen = logits.abs().topk(count, dim=1, largest=False, sorted=False).indices  # (M, count)
    return candidates.gather(1, chosen[..., None].expand(-1, -1, 2))


def valid_cells(valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From valid pixels (B, H, W): valid cells (B, h, w) of a map, and the image part of height and width (B, 2).

    A cell that holds any valid pixel is valid; the image stands in the top left corner.
    """
    rows, columns = valid.any(2).sum(1), valid.any(1).sum(1)  # (B,) pixels
    extents = torch.stack([rows / valid.shape[1], columns / valid.shape[2]], 1)  # (B, 2)
    cells = (extents * extents.new_tensor(size)).ceil()  # (B, 2)
    row = torch.arange(size[0], device=valid.device)[:, None]
    column = torch.arange(size[1], device=valid.device)
    return (row < cells[:, :1, None]) & (column < cells[:, 1:, None]), extents
