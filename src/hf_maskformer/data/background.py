"""The class of what lies between objects, where formats that know objects only serve the semantic task.

Without it those pixels would be void: no prediction there would count, and a model that calls everything an object
would have an IoU of 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_maskformer.data.sample import make_segment, segment_masks
from hf_maskformer.model.label_spec import LabelSpec

BACKGROUND = "background"


def needs_background(task: str, served: Sequence[str]) -> bool:
    """Whether `task` labels all pixels, and the truth of a format that serves these tasks ends where its objects end,
    as it does where the default, the first, is the instances."""
    return task == "semantic" and served[0] == "instance"


def with_background(label_spec: LabelSpec) -> tuple[LabelSpec, int]:
    """The classes with one more at the end, and its label; a class of that name is taken for it where there is one."""
    for label, name in label_spec.id2label.items():
        if name.lower() == BACKGROUND:
            return label_spec, label
    label = label_spec.num_labels
    # A void value that is the new label moves on.
    ignore_index = label_spec.ignore_index if label_spec.ignore_index != label else label + 1
    names = {**label_spec.id2label, label: BACKGROUND}
    return LabelSpec(names, label_spec.thing_label_ids, ignore_index, label_spec.raw_to_label), label


def with_background_segment(row: Mapping[str, Any], label: int) -> dict[str, Any]:
    """The row with a segment more: all pixels that belong to none."""
    segments = row["segments"]
    outside = segment_masks(row, segments).top_map() == 0
    if not outside.any():
        return dict(row)
    number = max((segment["id"] for segment in segments), default=0) + 1
    return {**row, "segments": [*segments, make_segment(number, label, outside)]}
