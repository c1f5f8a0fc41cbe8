"""Where objects are: a map that rises to 1 in the middle of every object, and the anchors picked from it.

FastInst (He et al., CVPR 2023, sec. 3.2) starts its queries from the pixels that look most like an object. What a
pixel looks like is learned per pixel, as fast as per-pixel classification, while learned queries must first share the
image out among themselves. FastInst's map is the class probability; ours has one bump per object as CenterNet's heat
map (Zhou et al. 2019, sec. 3) has, so that touching objects of one class keep a peak each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_ANCHOR = -1  # row and column of a query that has none
PRIOR = 0.1  # value of the map before training, as in focal loss (Lin et al. 2017, sec. 3.3)


class ObjectnessHead(nn.Module):
    """Two linear layers on each pixel's embedding: (B, E, h, w) -> logits (B, h, w).

    It sees single pixels only, so that what stands in the padding cannot reach the image.
    """

    def __init__(self, mask_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(mask_dim, mask_dim, kernel_size=1)
        self.output = nn.Conv2d(mask_dim, 1, kernel_size=1)

    def forward(self, mask_features: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(mask_features)))[:, 0]


@torch.no_grad()
def pick_anchors(objectness: Tensor, padding: Tensor | None, *, count: int) -> Tensor:
    """The cells of the highest peaks: logits (B, h, w), padding (B, h, w) or None -> (B, count, 2) row and column.

    A peak is not lower than its 8 neighbours. Where there are fewer peaks than `count`, the highest other cells
    follow; an image of fewer cells gives some of them again. None is in the padding.
    """
    height, width = objectness.shape[-2:]
    heights = objectness.float().sigmoid()
    if padding is not None:
        heights = heights.masked_fill(padding, -1.0)
    highest = F.max_pool2d(heights[:, None], kernel_size=3, stride=1, padding=1)[:, 0]
    ranked = torch.where(heights == highest, heights + 2.0, heights).flatten(1)  # (B, h*w)
    if padding is not None:
        ranked = ranked.masked_fill(padding.flatten(1), -1.0)
    cells = ranked.topk(min(count, height * width), dim=1).indices
    usable = cells.new_full((cells.shape[0],), cells.shape[1])
    if padding is not None:
        usable = (~padding).flatten(1).sum(1).clamp(1, cells.shape[1])
    order = torch.arange(count, device=cells.device) % usable[:, None]  # (B, count)
    cells = cells.gather(1, order)
    return torch.stack([cells // width, cells % width], dim=-1)


def at_anchors(maps: Tensor, anchors: Tensor) -> Tensor:
    """Values of maps at the anchors: (B, C, h, w), (B, Q, 2) -> (B, Q, C)."""
    cells = anchors[..., 0] * maps.shape[-1] + anchors[..., 1]  # (B, Q)
    return maps.flatten(2).transpose(1, 2).gather(1, cells[..., None].expand(-1, -1, maps.shape[1]))


def objectness_target(masks: Tensor) -> Tensor:
    """(N, h, w) masks of one image -> (h, w): an elliptic bump in each, 1 at its middle; the highest where they meet.

    The bump is the Gaussian of the mask's own mean and covariance, cut off at the mask and scaled to a maximum of 1.
    """
    count, height, width = masks.shape
    if count == 0:
        return masks.new_zeros((height, width))
    row = torch.arange(height, device=masks.device, dtype=masks.dtype)
    column = torch.arange(width, device=masks.device, dtype=masks.dtype)
    tiny = torch.finfo(masks.dtype).tiny
    area = masks.sum((1, 2)).clamp(min=tiny)[:, None]  # (N, 1)
    by_row, by_column = masks.sum(2) / area, masks.sum(1) / area  # (N, h), (N, w)
    rows = row - (by_row * row).sum(1, keepdim=True)  # (N, h), from the mask's mean
    columns = column - (by_column * column).sum(1, keepdim=True)
    # A cell has an extent: 1/12 is the variance of a square of side 1.
    row_variance = (by_row * rows**2).sum(1) + 1 / 12  # (N,)
    column_variance = (by_column * columns**2).sum(1) + 1 / 12
    covariance = torch.einsum("nhw,nh,nw->n", masks, rows, columns) / area[:, 0]
    determinant = (row_variance * column_variance - covariance**2).clamp(min=tiny)[:, None, None]
    distance = (
        column_variance[:, None, None] * rows[:, :, None] ** 2
        + row_variance[:, None, None] * columns[:, None, :] ** 2
        - 2 * covariance[:, None, None] * rows[:, :, None] * columns[:, None, :]
    ) / determinant  # (N, h, w) squared Mahalanobis distance
    bumps = (-0.5 * distance).exp() * masks
    return (bumps / bumps.amax((1, 2), keepdim=True).clamp(min=tiny)).amax(0)


def objectness_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Quality focal loss (Li et al. 2020, sec. 3.1, beta 2), summed over the valid pixels: (B, h, w) -> (B,)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (cross_entropy * (target - logits.sigmoid()) ** 2 * valid).flatten(1).sum(1)
