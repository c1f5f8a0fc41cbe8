"""What `inspect_dataset` reports, and the counts it is made from.

The counts grow by a few bytes for an image or segment and hold no pixels, so a dataset of any size can be inspected.
"""

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_maskformer.data.problems import Problem
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import rles_to_runs

SMALL_AREA, MEDIUM_AREA = 32**2, 96**2  # COCO's limits of small and medium objects, in pixels
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class ImageFacts:
    """What is counted of one image or volume.

    Attributes:
        name: its file, for the lists of the report.
        size: (H, W) or (D, H, W).
        labels: (N,) label id of each segment.
        pixels: (N,) pixels or voxels of each segment.
        crowds: (N,) bool.
        void: pixels in no segment.
        overlap: pixels that would have to be taken away for no two segments to overlap.
        spacing: (D, H, W) in millimetres, for volumes.
    """

    name: str
    size: tuple[int, ...]
    labels: np.ndarray
    pixels: np.ndarray
    crowds: np.ndarray
    void: int
    overlap: int = 0
    spacing: tuple[float, ...] = ()

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "ImageFacts":
        """Counts of a row of `sample.FEATURES`; pixels are those of the masks, not the stored areas."""
        size = (row["height"], row["width"])
        runs = rles_to_runs([{"size": list(size), "counts": segment["rle"]} for segment in row["segments"]], size)
        pixels = runs.areas()
        covered = _union(runs.starts, runs.lengths)
        return cls(
            name=row["file_name"],
            size=size,
            labels=np.array([segment["label_id"] for segment in row["segments"]], dtype=np.int64),
            pixels=pixels,
            crowds=np.array([segment["iscrowd"] for segment in row["segments"]], dtype=bool),
            void=size[0] * size[1] - covered,
            overlap=int(pixels.sum()) - covered,
        )


@dataclass(frozen=True)
class ClassCount:
    """One line of the class table; crowds are counted apart. `share` is of the pixels of all images."""

    label_id: int
    name: str
    isthing: bool
    images: int
    segments: int
    pixels: int
    share: float
    crowds: int
    crowd_pixels: int


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest value."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class SplitReport:
    """One split in one format.

    Attributes:
        split: its name; None for a folder that is itself one split.
        format: the reader's name.
        images: images (or volumes) whose annotation could be read; everything below is counted of these.
        classes: every class that has a name, used or not.
        void_share: part of all pixels that lies in no segment.
        sizes: ((H, W) or (D, H, W), number of images), the most frequent first.
        dimensions: spread of height, width and aspect (width / height); for volumes depth and spacing too.
        objects: segments of an image without crowds: things, or classes where there are no things.
        areas: pixels of these segments at the quantiles `QUANTILES`.
        area_groups: how many are small, medium and large as COCO says.
        overlapping: names of the images in which segments overlap.
        empty: names of the images without segments.
        modes: number of images of each PIL mode, such as RGB or I;16.
    """

    split: str | None
    format: str
    images: int = 0
    classes: tuple[ClassCount, ...] = ()
    void_pixels: int = 0
    void_share: float = 0.0
    sizes: tuple[tuple[tuple[int, ...], int], ...] = ()
    dimensions: dict[str, Spread] = field(default_factory=dict)
    objects: Spread | None = None
    areas: dict[float, float] = field(default_factory=dict)
    area_groups: dict[str, int] = field(default_factory=dict)
    overlapping: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    modes: dict[str, int] = field(default_factory=dict)

    @property
    def unused_classes(self) -> list[str]:
        return [entry.name for entry in self.classes if not entry.segments + entry.crowds]

    @property
    def deep_modes(self) -> dict[str, int]:
        """Of `modes` those of more than 8 bits, which training refuses without an intensity_range."""
        return {mode: count for mode, count in self.modes.items() if mode.startswith(("I", "F"))}


@dataclass(frozen=True)
class FoundProblem:
    """A problem with where it was met; `refused`: `load` stops there, the others it can live with."""

    problem: Problem
    split: str | None
    format: str
    refused: bool


@dataclass(frozen=True)
class DatasetReport:
    """All splits and formats of a dataset, and everything that is wrong with it."""

    root: str
    splits: tuple[SplitReport, ...]
    problems: tuple[FoundProblem, ...]
    pictures: tuple[Any, ...] = ()

    @property
    def errors(self) -> int:
        return sum(found.refused for found in self.problems)

    def problem_counts(self) -> dict[str, int]:
        """Number of problems of each kind."""
        return dict(Counter(found.problem.kind for found in self.problems))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the pictures."""
        splits = [{**dataclasses.asdict(split), "unused_classes": split.unused_classes} for split in self.splits]
        problems = [
            {
                "severity": "error" if found.refused else "warning",
                "split": found.split,
                "format": found.format,
                **dataclasses.asdict(found.problem),
            }
            for found in self.problems
        ]
        for split in splits:
            split["areas"] = {str(quantile): area for quantile, area in split["areas"].items()}
        counts = {"errors": self.errors, "warnings": len(problems) - self.errors, "by_kind": self.problem_counts()}
        return {"root": self.root, "splits": splits, "problem_counts": counts, "problems": problems}


class SplitCounts:
    """Sums up the images of one split."""

    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec
        self.sizes: Counter[tuple[int, ...]] = Counter()
        self.spacings: Counter[tuple[float, ...]] = Counter()
        self.objects: Counter[int] = Counter()
        self.areas = array("d")
        self.class_images, self.segments, self.pixels, self.crowds, self.crowd_pixels = np.zeros(
            (5, spec.num_labels), dtype=np.int64
        )
        self.void = 0
        self.overlapping: list[str] = []
        self.empty: list[str] = []

    def add(self, facts: ImageFacts) -> None:
        labels, single, count = facts.labels, ~facts.crowds, self.spec.num_labels
        self.sizes[facts.size] += 1
        self.spacings[facts.spacing] += 1
        self.class_images[np.unique(labels)] += 1
        for kind, number, pixels in ((single, self.segments, self.pixels), (~single, self.crowds, self.crowd_pixels)):
            number += np.bincount(labels[kind], minlength=count)
            np.add.at(pixels, labels[kind], facts.pixels[kind])
        counted = single & np.isin(labels, self.spec.thing_label_ids) if self.spec.thing_label_ids else single
        self.objects[int(counted.sum())] += 1
        self.areas.extend(facts.pixels[counted].tolist())
        self.void += facts.void
        if facts.overlap:
            self.overlapping.append(facts.name)
        if not len(labels):
            self.empty.append(facts.name)

    def report(self, split: str | None, format: str, modes: Counter[str]) -> SplitReport:
        images, total = sum(self.sizes.values()), sum(int(np.prod(size)) * n for size, n in self.sizes.items())
        if not images:
            return SplitReport(split, format, classes=self._classes(1), modes=dict(modes))
        areas = np.asarray(self.areas)
        limits = (areas < SMALL_AREA, (areas >= SMALL_AREA) & (areas < MEDIUM_AREA), areas >= MEDIUM_AREA)
        quantiles = np.quantile(areas, QUANTILES).tolist() if len(areas) else []
        return SplitReport(
            split=split,
            format=format,
            images=images,
            classes=self._classes(total),
            void_pixels=self.void,
            void_share=self.void / total,
            sizes=tuple(self.sizes.most_common()),
            dimensions=self._dimensions(),
            objects=_spread(self.objects.items()),
            areas=dict(zip(QUANTILES, quantiles, strict=False)),
            area_groups={
                name: int(inside.sum()) for name, inside in zip(("small", "medium", "large"), limits, strict=True)
            },
            overlapping=tuple(self.overlapping),
            empty=tuple(self.empty),
            modes=dict(modes.most_common()),
        )

    def _classes(self, total: int) -> tuple[ClassCount, ...]:
        return tuple(
            ClassCount(
                label_id=label,
                name=name,
                isthing=label in self.spec.thing_label_ids,
                images=int(self.class_images[label]),
                segments=int(self.segments[label]),
                pixels=int(self.pixels[label]),
                share=int(self.pixels[label]) / total,
                crowds=int(self.crowds[label]),
                crowd_pixels=int(self.crowd_pixels[label]),
            )
            for label, name in self.spec.id2label.items()
        )

    def _dimensions(self) -> dict[str, Spread]:
        axes = {"height": -2, "width": -1}
        if any(len(size) == 3 for size in self.sizes):
            axes = {"depth": -3, **axes}
        found = {name: _spread((size[axis], n) for size, n in self.sizes.items()) for name, axis in axes.items()}
        found["aspect"] = _spread((size[-1] / size[-2], n) for size, n in self.sizes.items())
        for axis, name in enumerate(("spacing_depth", "spacing_height", "spacing_width")):
            if any(self.spacings):
                found[name] = _spread((spacing[axis], n) for spacing, n in self.spacings.items())
        return found


def _union(starts: np.ndarray, lengths: np.ndarray) -> int:
    """Number of pixels in at least one of the runs."""
    order = np.argsort(starts, kind="stable")
    first, last = starts[order], starts[order] + lengths[order]
    reached = np.maximum.accumulate(np.concatenate([[0], last]))[:-1]
    return int((last - np.maximum(first, reached)).clip(min=0).sum())


def _spread(counts: Iterable[tuple[float, int]]) -> Spread:
    """Of values that are given with their number."""
    pairs = sorted(counts)
    values, numbers = [value for value, _ in pairs], np.cumsum([number for _, number in pairs])
    low, high = np.searchsorted(numbers, [(numbers[-1] + 1) // 2, numbers[-1] // 2 + 1])
    return Spread(values[0], (values[low] + values[high]) / 2, values[-1])
