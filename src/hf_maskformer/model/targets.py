"""Targets of a batch: checked, padded to one tensor, and brought to the size of the predictions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL = 4  # pixels in a row of a cell of the predicted masks, and bytes in an int32


class Targets(NamedTuple):
    """The batch's targets, padded to the largest number of segments N."""

    masks: Tensor  # (B, N, H, W) bool, uint8 or float; 0 beyond an image's own segments
    labels: list[Tensor]  # B tensors (N_i,)
    counts: list[int]
    valid: Tensor  # (B, H, W) bool, False in padding


def prepare_targets(
    mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], pixel_mask: Tensor | None, *, num_images: int
) -> Targets:
    """Check the batch's targets and pad them to one tensor; masks keep their dtype (bool stays bool)."""
    if len(mask_labels) != num_images or len(class_labels) != num_images:
        raise ValueError(
            f"{num_images} images need as many targets; got {len(mask_labels)} mask_labels, "
            f"{len(class_labels)} class_labels."
        )
    sizes = {tuple(masks.shape[-2:]) for masks in mask_labels}
    if len(sizes) > 1:
        raise ValueError(f"mask_labels must share one canvas (pad them with 0), got the sizes {sorted(sizes)}.")
    for index, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if labels.is_floating_point():
            raise ValueError(f"Image {index}: class_labels must be integers, got {labels.dtype}.")
        if masks.ndim != 3 or labels.ndim != 1 or len(masks) != len(labels):
            raise ValueError(
                f"Image {index}: mask_labels must be (N, H, W) and class_labels (N,), got {tuple(masks.shape)} and "
                f"{tuple(labels.shape)}."
            )
    counts = [len(masks) for masks in mask_labels]
    padded = nn.utils.rnn.pad_sequence(list(mask_labels), batch_first=True)  # (B, N, H, W)
    height, width = padded.shape[-2:]
    if pixel_mask is None:
        valid = torch.ones((num_images, height, width), dtype=torch.bool, device=padded.device)
    else:
        valid = resize_masks((pixel_mask > 0)[:, None], (height, width))[:, 0]
    return Targets(padded, [labels.to(torch.int64) for labels in class_labels], counts, valid)


def resize_masks(masks: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Nearest-neighbour resize of (B, N, H, W) masks; bool, uint8 and float keep their dtype, others get float32."""
    size = (size[0], size[1])
    if not masks.numel():
        return masks.new_zeros((masks.shape[0], masks.shape[1], *size))
    if masks.shape[-2:] == size:
        return masks
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        masks = masks.to(torch.float32)
    steps = [old // new for old, new in zip(masks.shape[-2:], size, strict=True)]
    if tuple(masks.shape[-2:]) == (steps[0] * size[0], steps[1] * size[1]):
        return masks[..., :: steps[0], :: steps[1]].contiguous()  # interpolate takes 15 times as long on a CPU
    if masks.dtype == torch.bool:
        return F.interpolate(masks.view(torch.uint8), size=size, mode="nearest").view(torch.bool)
    return F.interpolate(masks, size=size, mode="nearest")


def average_masks(masks: Tensor, valid: Tensor, size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
    """Average masks down to the share of each cell's *valid* pixels that they cover.

    Args:
        masks: (B, N, H, W).
        valid: (B, H, W) in the dtype of the result, 0 in padding.
        size: Height and width of the result.

    Returns:
        (B, N, h, w) shares, and (B, h, w) the share of each cell that is valid: its weight in the loss.
    """
    size = (size[0], size[1])
    weight = F.adaptive_avg_pool2d(valid[:, None], size)  # (B, 1, h, w)
    if _is_of_bytes(masks, size):
        covered = _sums_of_cells(masks, valid, size).to(valid.dtype) / CELL**2  # (B, N, h, w)
    else:
        covered = F.adaptive_avg_pool2d(masks.to(valid.dtype) * valid[:, None], size)
    return covered / weight.clamp(min=torch.finfo(valid.dtype).tiny), weight[:, 0]


def _is_of_bytes(masks: Tensor, size: tuple[int, int]) -> bool:
    whole = tuple(masks.shape[-2:]) == (CELL * size[0], CELL * size[1])
    return whole and masks.dtype in (torch.bool, torch.uint8) and masks.numel() > 0


def _sums_of_cells(masks: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Numbers of the valid pixels of (B, N, H, W) masks of bytes 0 or 1 in cells of 4x4: (B, N, h, w) int32.

    The four bytes of a cell's row are added up as one number, as no byte of a cell's sum exceeds 4. Averaging floats
    of the full size takes twenty times as long, a fourteenth of a training step on a CPU with 40 segments an image.
    """
    inside = masks.view(torch.uint8) * (valid > 0).view(torch.uint8)[:, None]  # (B, N, H, W)
    rows = inside.view(torch.int32).unflatten(2, (size[0], CELL)).sum(3, dtype=torch.int32)  # (B, N, h, w)
    return (rows * 0x01010101) >> 24  # the highest byte of the product is the sum of the four


def paint_labels(masks: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """(B, N, h, w) masks and their classes -> (B, h, w) class map, -1 where no mask lies; smaller masks lie on top."""
    images, most, height, width = masks.shape
    if most == 0:
        return torch.full((images, height, width), -1, dtype=torch.int64, device=masks.device)
    classes = torch.full((images, most), -1, dtype=torch.int64, device=masks.device)
    for index, image_labels in enumerate(labels):
        classes[index, : len(image_labels)] = image_labels
    area = masks.flatten(2).sum(-1)  # (B, N)
    priority = (masks > 0.5) / area.clamp(min=1)[:, :, None, None]  # (B, N, h, w)
    best, owner = priority.max(dim=1)  # (B, h, w)
    painted = classes.gather(1, owner.flatten(1)).view(images, height, width)
    return painted.masked_fill(best <= 0, -1)


def within_unit(masks: Tensor) -> Tensor:
    """Per image, whether all of its (N, H, W) masks lie within 0..1: (B, N, H, W) -> (B,)."""
    if masks.dtype == torch.bool or not masks.numel():
        return torch.ones(masks.shape[0], dtype=torch.bool, device=masks.device)
    flat = masks.flatten(1)
    return ((flat >= 0) & (flat <= 1)).all(-1)  # not a number is neither
