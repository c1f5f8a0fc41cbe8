"""What the models refuse at their border, with errors that name argument, value and what is allowed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


def all_finite(values: Tensor) -> Tensor:
    """Over the last axis: its extremes are not finite if one of its values is not. One pass, nothing is stored."""
    return values.amin(-1).isfinite() & values.amax(-1).isfinite()


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
    for index, masks in enumerate(() if mask_labels is None else mask_labels):  # a stacked tensor has no truth value
        if tuple(masks.shape[-2:]) != canvas:
            raise ValueError(f"mask_labels[{index}] is {tuple(masks.shape[-2:])}, the canvas of its image {canvas}.")


def refuse_unknown_arguments(arguments: dict[str, Any]) -> None:
    """Trainer and pipeline may hand on `num_items_in_batch`; anything else unknown is a mistake of the caller."""
    unknown = sorted(set(arguments) - {"num_items_in_batch"})
    if unknown:
        raise TypeError(f"forward() got an unexpected argument {unknown[0]!r}.")


def check_labels(labels: np.ndarray, wrong: np.ndarray, num_labels: int) -> None:
    """ValueError for the first of the (B, N) labels that is marked in `wrong`."""
    if not wrong.any():
        return
    image, position = np.argwhere(wrong)[0]
    value = int(labels[image, position])
    hint = " The ids look 1-based: subtract 1." if value == num_labels else ""
    raise ValueError(
        f"class_labels[{image}] contains {value}, allowed are 0..{num_labels - 1} ({num_labels} labels).{hint}"
    )


def check_finite(finite: np.ndarray) -> None:
    """The rows of `finite` (R, B): class logits, mask logits, targets, whether targets lie in 0..1, objectness."""
    for row, what in ((0, "class logits"), (1, "mask logits"), (2, "mask_labels"), (4, "objectness logits")):
        if row < len(finite) and not finite[row].all():
            image = int(np.argmin(finite[row]))
            raise FloatingPointError(
                f"Non-finite {what} for image {image} of the batch. Look at this image and its targets; if they are "
                "sound, lower the learning rate or train in float32."
            )
    if not finite[3].all():
        raise ValueError(
            f"mask_labels[{int(np.argmin(finite[3]))}] has values outside 0..1, or that are no numbers; masks are 0 "
            "or 1, and 0 in padding (a void value such as 255 is none: leave those pixels 0)."
        )


def warn_if_more_targets(counts: list[int], num_queries: int) -> None:
    """One warning a process: surplus targets have no query to learn them."""
    if max(counts, default=0) > num_queries:
        image = int(np.argmax(counts))
        logger.warning_once(
            f"Image {image} of a batch has {counts[image]} targets for {num_queries} queries: the worst matching "
            f"{counts[image] - num_queries} are left out of the loss. Raise num_queries."
        )
