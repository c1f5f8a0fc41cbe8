"""What the label numbers of a dataset mean, and the checks that keep wrong numbers out of training.

One object says which ids exist, which of them are countable things, which value marks pixels to ignore and how the
raw values of a dataset map to label ids. Nothing is guessed: 0 is a label like any other, never "background".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


def label_table(id2label: Any) -> dict[int, str]:
    """Label id -> name, ascending, from a table whose keys may be strings, as JSON makes them.

    Raises:
        ValueError: It is no table, or a key is no integer.
    """
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label must be a dict of label id -> name, got {id2label!r}")
    try:
        return {int(key): str(name) for key, name in sorted(id2label.items(), key=lambda item: int(item[0]))}
    except (TypeError, ValueError):
        raise ValueError(f"id2label must have integers as keys, got {list(id2label)[:10]}") from None


def default_thing_label_ids(task: str | None, id2label: Any) -> list[int] | None:
    """What is countable where nobody says it: nothing in a semantic task, every label in the others.

    None (not known) without a task or without labels. One rule for the model's config and its image processor.
    """
    if task is None or id2label is None:
        return None
    return [] if task == "semantic" else sorted(label_table(id2label))


@dataclass(frozen=True)
class LabelSpec:
    """Label ids 0..K-1 with their names.

    Attributes:
        id2label: name of every label id; the ids are 0..K-1 without a gap.
        thing_label_ids: labels with countable instances; all others are stuff.
        ignore_index: value of pixels that belong to no label; it may not be a label id.
        raw_to_label: raw dataset value -> label id (or ignore_index); None if the data already holds label ids.
    """

    id2label: dict[int, str]
    thing_label_ids: tuple[int, ...] = ()
    ignore_index: int = 255
    raw_to_label: dict[int, int] | None = field(default=None)

    def __post_init__(self) -> None:
        id2label = label_table(self.id2label)
        object.__setattr__(self, "id2label", id2label)
        object.__setattr__(self, "thing_label_ids", tuple(sorted({int(value) for value in self.thing_label_ids})))
        if not id2label or list(id2label) != list(range(len(id2label))):
            raise ValueError(f"id2label must name the ids 0..K-1 without a gap, got {list(id2label)}")
        unknown = [value for value in self.thing_label_ids if value not in id2label]
        if unknown:
            raise ValueError(f"thing_label_ids {unknown} are not in id2label, allowed: 0..{self.num_labels - 1}")
        if self.ignore_index in id2label:
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the label {id2label[self.ignore_index]!r}: its pixels "
                f"would never be trained. Choose an ignore_index outside 0..{self.num_labels - 1}"
            )
        if self.raw_to_label is not None:
            raw_to_label = {int(raw): int(label) for raw, label in self.raw_to_label.items()}
            object.__setattr__(self, "raw_to_label", raw_to_label)
            for raw, label in raw_to_label.items():
                if label not in id2label and label != self.ignore_index:
                    raise ValueError(
                        f"raw_to_label maps {raw} to {label}, allowed: 0..{self.num_labels - 1} or {self.ignore_index}"
                    )

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def stuff_label_ids(self) -> tuple[int, ...]:
        return tuple(label for label in self.id2label if label not in self.thing_label_ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; the keys of the two tables become strings."""
        raw_to_label = self.raw_to_label
        return {
            "id2label": {str(label): name for label, name in self.id2label.items()},
            "thing_label_ids": list(self.thing_label_ids),
            "ignore_index": self.ignore_index,
            "raw_to_label": None if raw_to_label is None else {str(raw): label for raw, label in raw_to_label.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LabelSpec":
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        allowed = ("id2label", "thing_label_ids", "ignore_index", "raw_to_label")
        unknown = sorted(set(fields) - set(allowed))
        if unknown:
            raise ValueError(f"label spec has unknown keys {unknown}, allowed: {list(allowed)}")
        return cls(**fields)

    def check_class_labels(self, ids: Iterable[int] | np.ndarray | torch.Tensor, where: str) -> None:
        """Raise ValueError if one of the ids is not a label; `where` names the image or file in the message."""
        values = _unique(ids, where)
        wrong = values[(values < 0) | (values >= self.num_labels)]
        if len(wrong) == 0:
            return
        hint = ""
        if values.min() >= 1 and values.max() == self.num_labels:
            hint = "; the labels look 1-based (none is 0, the largest is K): subtract 1, or set do_reduce_labels=True"
        raise ValueError(
            f"{where}: label {_listed(wrong)} is not in id2label, allowed: 0..{self.num_labels - 1}{hint}"
        )

    def check_semantic_map(self, semantic_map: np.ndarray | torch.Tensor, where: str) -> None:
        """As `check_class_labels` for the values of a map, in which `ignore_index` is allowed too."""
        values = _unique(semantic_map, where)
        try:
            self.check_class_labels(values[values != self.ignore_index], where)
        except ValueError as error:
            raise ValueError(f"{error}; ignore_index is {self.ignore_index}") from None

    def map_raw(self, array: np.ndarray, where: str) -> np.ndarray:
        """Apply `raw_to_label` to every value (int64 result, same shape); without a table the values are returned.

        `ignore_index` stays what it is unless the table names it. Any other value that the table lacks is a
        ValueError.
        """
        raw = np.asarray(array)
        values = _unique(raw, where)
        if self.raw_to_label is None:
            return raw.astype(np.int64)
        table = {self.ignore_index: self.ignore_index} | self.raw_to_label
        unknown = np.array([value for value in values.tolist() if value not in table], dtype=np.int64)
        if len(unknown):
            raise ValueError(f"{where}: raw value {_listed(unknown)} is not in raw_to_label, known: {sorted(table)}")
        labels = np.array([table[value] for value in values.tolist()], dtype=np.int64)
        return labels[np.searchsorted(values, raw)] if len(values) else raw.astype(np.int64)


def _unique(ids: Iterable[int] | np.ndarray | torch.Tensor, where: str) -> np.ndarray:
    """Sorted different values as int64; anything but integers is a ValueError."""
    if isinstance(ids, torch.Tensor):
        array = ids.detach().cpu().numpy()
    else:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{where}: labels must be integers, got {array.dtype}")
    if array.dtype == np.uint8:  # counting is much faster than sorting, and most label maps are 8-bit
        return np.flatnonzero(np.bincount(array.reshape(-1), minlength=256)).astype(np.int64)
    return np.unique(array).astype(np.int64)


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:5].tolist())
    return shown + (", ..." if len(values) > 5 else "")
