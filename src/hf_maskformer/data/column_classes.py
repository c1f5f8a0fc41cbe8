"""Class numbers, names and colours of a `datasets` column as label ids 0..K-1."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_maskformer.data.label_table import LabelTable, colour_text
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_runs, panoptic_png_to_ids

SHOWN_CLASSES = 20
SHOWN_COLOURS = 5
LARGEST_TABLE = 2**16  # maps with larger values are looked up by search


@dataclass(frozen=True)
class ColumnClasses:
    """From what stands in a column to label ids.

    Attributes:
        label_spec: the labels; its `raw_to_label` maps the class numbers of the column where those are no label ids.
        void: value of a map's pixels without a class.
        reduce_labels: whether 0 of a map is void too and n means class number n - 1.
        colours: the table of maps in colour.
    """

    label_spec: LabelSpec
    void: int
    reduce_labels: bool = False
    colours: LabelTable | None = None

    def label(self, value: Any, where: str) -> int:
        """Label id of a class number or name; DatasetError if it is not known."""
        table: Mapping[Any, int] = number_table(self.label_spec)
        if isinstance(value, str):
            table = {name: label for label, name in self.label_spec.id2label.items()}
        if isinstance(value, (int, float, str)) and value in table:
            return table[value]
        shown = ", ".join(map(str, list(table)[:SHOWN_CLASSES])) + (", ..." if len(table) > SHOWN_CLASSES else "")
        raise DatasetError("unknown_label", where, f"{where}: class {value!r} is not known, allowed: {shown}")

    def labels_of_map(self, values: np.ndarray, where: str, problems: Problems) -> np.ndarray:
        """(H, W) int64 label ids of a map of class numbers (H, W) or colours (H, W, 3); void is the spec's.

        Unknown values are a problem; where `problems` goes on, their pixels are void.
        """
        if self.colours is not None:
            return self._labels_of_colours(self.colours, values, where, problems)
        if values.ndim == 3:
            message = (
                f"{where}: a label map in colour, and colours do not say which label is meant. Give label_table, or "
                "a column with label ids in one channel"
            )
            raise DatasetError("unknown_label", where, message)
        found = found_values(values)
        numbers = self.class_numbers(found)
        known = numbers[numbers != self.void]
        with problems.catch(where), problem_kind("unknown_label", where):
            if self.label_spec.raw_to_label is None:
                self._check_numbers(known, where)
            else:
                self.label_spec.map_raw(known, where)
        table = number_table(self.label_spec)
        void = self.label_spec.ignore_index
        return looked_up(values, found, [table.get(int(number), void) for number in numbers])

    def class_numbers(self, values: np.ndarray) -> np.ndarray:
        """int64 class numbers of raw values; `void` stays."""
        values = values.astype(np.int64)
        if not self.reduce_labels:
            return values
        return np.where((values == 0) | (values == self.void), self.void, values - 1)

    def _check_numbers(self, numbers: np.ndarray, where: str) -> None:
        try:
            self.label_spec.check_class_labels(numbers, where)
        except ValueError as error:
            raise ValueError(f"{error}; ignore_index is {self.void}") from None

    def _labels_of_colours(self, table: LabelTable, values: np.ndarray, where: str, problems: Problems) -> np.ndarray:
        if values.ndim != 3:
            message = f"{where}: label_table has colours, but this map has one channel"
            raise DatasetError("unknown_label", where, message)
        codes = panoptic_png_to_ids(values[..., ::-1])  # 65536 R + 256 G + B
        found = found_values(codes)
        labels, known = table.labels_of(found)
        with problems.catch(where):
            if not known.all():
                unknown = [colour_text(code) for code in found[~known].tolist()]
                shown = ", ".join(unknown[:SHOWN_COLOURS]) + (", ..." if len(unknown) > SHOWN_COLOURS else "")
                message = f"{where}: {len(unknown)} colour(s) are not in {table.source}: {shown}"
                raise DatasetError("unknown_label", where, message)
        return looked_up(codes, found, labels)


def number_table(spec: LabelSpec) -> dict[int, int]:
    """Class number -> label id, without void."""
    if spec.raw_to_label is None:
        return {label: label for label in spec.id2label}
    return {number: label for number, label in spec.raw_to_label.items() if label != spec.ignore_index}


def found_values(values: np.ndarray) -> np.ndarray:
    """Sorted different values of an (H, W) map."""
    return np.unique(id_map_runs(values)[0])


def looked_up(values: np.ndarray, found: np.ndarray, labels: Iterable[int]) -> np.ndarray:
    """The map with each of its sorted values `found` replaced by the label at the same place."""
    replacements = np.fromiter(labels, dtype=np.int64)
    if len(found) == 0:
        return values.astype(np.int64)
    if found[0] < 0 or found[-1] >= LARGEST_TABLE:
        return replacements[np.searchsorted(found, values)]
    table = np.zeros(int(found[-1]) + 1, dtype=np.int64)
    table[found] = replacements
    return table[values]
