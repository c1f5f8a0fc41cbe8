"""What the models refuse at their border, with errors that name argument, value and what is allowed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_inputs(pixel_values: Tensor, pixel_mask: Tensor | None, *, num_channels: int) -> None:
    """`pixel_values` must be (B, C, H, W) with the model's channels, `pixel_mask` (B, H, W)."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(f"pixel_values must be (B, {num_channels}, H, W), got {tuple(pixel_values.shape)}.")
    if pixel_mask is not None and pixel_mask.shape != pixel_values[:, 0].shape:
        raise ValueError(
            f"pixel_mask must be {tuple(pixel_values[:, 0].shape)} for these pixel_values, got "
            f"{tuple(pixel_mask.shape)}."
        )


def check_targets(
    mask_labels: Sequence[Tensor] | None, class_labels: Sequence[Tensor] | None, pixel_values: Tensor
) -> None:
    """Masks and classes come together, and every mask has the size of the padded images."""
    if (mask_labels is None) != (class_labels is None):
        raise ValueError("mask_labels and class_labels belong together: give both or none.")
    canvas = tuple(pixel_values.shape[-2:])
    for index, masks in enumerate(mask_labels or ()):
        if tuple(masks.shape[-2:]) != canvas:
            raise ValueError(f"mask_labels[{index}] is {tuple(masks.shape[-2:])}, the canvas of its image {canvas}.")


def refuse_unknown_arguments(arguments: dict[str, Any]) -> None:
    """Trainer and pipeline may hand on `num_items_in_batch`; anything else unknown is a mistake of the caller."""
    unknown = sorted(set(arguments) - {"num_items_in_batch"})
    if unknown:
        raise TypeError(f"forward() got an unexpected argument {unknown[0]!r}.")
