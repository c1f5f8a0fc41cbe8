"""Settings of the image processor beyond those of every image processor, and their checks."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from .label_spec import LabelSpec, default_thing_label_ids, label_table

TASKS = ("semantic", "instance", "panoptic")
CLASS_ACTIVATIONS = ("softmax", "sigmoid")
PANOPTIC_MERGES = ("argmax", "mask_wise")
SIZE_FORMS = ({"max_height", "max_width"}, {"shortest_edge", "longest_edge"}, {"height", "width"})
# What transformers' image-segmentation pipeline passes when its caller says nothing.
PIPELINE_THRESHOLDS = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}
THRESHOLDS = (*PIPELINE_THRESHOLDS, "stuff_overlap_mask_area_threshold")


class HfMaskFormerImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings beyond those of every image processor; see `HfMaskFormerImageProcessor`."""

    size_divisor: int
    ignore_index: int | None
    do_reduce_labels: bool
    id2label: dict | None
    thing_label_ids: list | tuple | None
    task: str | None
    class_activation: str
    threshold: float | int
    mask_threshold: float | int
    overlap_mask_area_threshold: float | int
    stuff_overlap_mask_area_threshold: float | int | None
    panoptic_merge: str
    intensity_range: list | tuple | None


def checked_settings(size: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, `size` among them, brought to one form.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    checked = dict(settings)
    size = dict(size) if isinstance(size, (Mapping, SizeDict)) else size
    if not isinstance(size, dict) or set(size) not in SIZE_FORMS or min(size.values()) < 1:
        raise ValueError(f"size must be a dict with positive {' or '.join(map(str, SIZE_FORMS))}, got {size!r}")
    check_choice("task", checked.get("task"), (*TASKS, None))
    check_choice("class_activation", checked.get("class_activation"), CLASS_ACTIVATIONS)
    check_choice("panoptic_merge", checked.get("panoptic_merge"), PANOPTIC_MERGES)
    for name in THRESHOLDS:
        value = checked.get(name)
        if value is None and name not in PIPELINE_THRESHOLDS:
            continue
        if value is None or not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value!r}")
    if checked.get("intensity_range") is not None:
        low, high = checked["intensity_range"] = tuple(float(value) for value in checked["intensity_range"])
        if not low < high:
            raise ValueError(f"intensity_range must be (low, high) with low < high, got {(low, high)}")
    if checked.get("thing_label_ids") is not None:
        checked["thing_label_ids"] = tuple(int(label) for label in checked["thing_label_ids"])
        if min(checked["thing_label_ids"], default=0) < 0:  # how many labels there are is not known without id2label
            raise ValueError(f"thing_label_ids must be label ids from 0 up, got {checked['thing_label_ids']}")
    labels = labels_of(checked.get("id2label"), checked.get("thing_label_ids"), checked.get("ignore_index"))
    if labels is not None:
        checked["id2label"] = labels.id2label
    return {**checked, "size": size}


def labels_of(id2label: Any, thing_label_ids: Sequence[int] | None, ignore_index: int | None) -> LabelSpec | None:
    """The labels as one object, or None without `id2label`; -1, which is never a label, stands for no ignore_index."""
    if id2label is None:
        return None
    return LabelSpec(id2label, tuple(thing_label_ids or ()), -1 if ignore_index is None else ignore_index)


def reset_things(fields: dict[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Set the stored `thing_label_ids` in `fields` to the task's default where other labels are given without them.

    The old ids speak of other classes. Returns whether something that was known has been replaced.
    """
    known, given = fields.get("thing_label_ids"), overrides.get("id2label")
    if known is None or "thing_label_ids" in overrides or "id2label" not in overrides:
        return False
    stored = fields.get("id2label")
    if given is not None and stored is not None and label_table(given) == label_table(stored):
        return False
    fields["thing_label_ids"] = default_thing_label_ids(overrides.get("task", fields.get("task")), given)
    return bool(known)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_merge(merge: str, task: str) -> None:
    """Raises ValueError for a panoptic merge that does not exist, or with a task that merges nothing."""
    check_choice("merge", merge, PANOPTIC_MERGES)
    if task != "panoptic":
        raise ValueError(f"merge is {merge!r} but the task is {task!r}: only task 'panoptic' merges masks")
