"""Boxes: formats, the boxes of masks, overlap (Rezatofighi et al., CVPR 2019: generalised IoU).

A box is x, y of its centre, width and height, as parts 0..1 of the padded canvas, unless a function says "corners":
left, top, right, bottom.
"""

import torch
from torch import Tensor

SMALLEST_AREA = 1e-7  # of the canvas, that an area is divided by
CLOSEST_TO_THE_END = 1e-5  # of 0..1, where the inverse of the sigmoid would leave the numbers


def corners_of_boxes(boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (..., 4) corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def boxes_of_corners(corners: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) boxes."""
    first, last = corners[..., :2], corners[..., 2:]
    return torch.cat([(first + last) / 2, last - first], -1)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """The tight box around the pixels above 0.5 of each mask: (..., H, W) -> (..., 4) float32, an empty mask 0 0 0 0.

    A pixel is an area: a mask of the whole canvas has the box 0.5, 0.5, 1, 1.
    """
    inside = masks > 0.5
    top, bottom = _span(inside.any(-1))  # (...,)
    left, right = _span(inside.any(-2))
    return boxes_of_corners(torch.stack([left, top, right, bottom], -1))


def _span(hit: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the True places, 0..1 of the length: (..., P) -> (...,) twice; 0 and 0 where there is none."""
    length = hit.shape[-1]
    places = torch.arange(length, device=hit.device)
    begin = torch.where(hit, places, length).amin(-1)
    end = torch.where(hit, places + 1, 0).amax(-1)
    return torch.minimum(begin, end).to(torch.float32) / length, end.to(torch.float32) / length


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU, -1..1, of boxes that broadcast: (..., 4), (..., 4) -> (...).

    Overlap over union, less the part of the box around both that neither covers. Two boxes without area have 0.
    """
    a, b = corners_of_boxes(first), corners_of_boxes(second)
    overlap = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    around = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = first[..., 2] * first[..., 3] + second[..., 2] * second[..., 3] - overlap
    return overlap / union.clamp(min=SMALLEST_AREA) - (around - union) / around.clamp(min=SMALLEST_AREA)


def _area(begin: Tensor, end: Tensor) -> Tensor:
    sides = (end - begin).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def box_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the four absolute differences of boxes that broadcast: (..., 4), (..., 4) -> (...)."""
    return (first - second).abs().sum(-1)


def refine_boxes(references: Tensor, changes: Tensor) -> Tensor:
    """Boxes (..., 4) from references (..., 2 or 4) and changes (..., 4) added before the sigmoid.

    A reference of two numbers is a centre: width and height then come from the changes alone (Deformable DETR, A.4).
    """
    before = torch.logit(references, eps=CLOSEST_TO_THE_END)
    known = before.shape[-1]
    return torch.cat([changes[..., :known] + before, changes[..., known:]], -1).sigmoid()
