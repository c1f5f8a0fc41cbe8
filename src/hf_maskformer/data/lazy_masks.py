"""Masks that stay run-length codes until somebody looks at their pixels, and then only at the pixels that are kept.

A training crop shows a part of the picture, resized. Its pixels are a grid of source rows and columns, so each run of
a code (a stretch of one column) becomes a stretch of one column of the crop, or nothing. All runs of all segments are
moved and painted together: the cost is that of the codes and of the crop, not of N pictures.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hf_maskformer.data.segment_masks import SegmentMasks, id_type, paint
from hf_maskformer.model.masks import rles_to_runs


class RleSegments(SegmentMasks):
    """`SegmentMasks` read from the codes of S segments, which form N masks; equal to the eager form in every pixel.

    The codes are parsed at once, so that a broken one is named early; `layers` are painted when first asked for, and
    `take` paints its own without them.
    """

    def __init__(self, runs: "Runs", targets: np.ndarray, count: int) -> None:
        """
        Args:
            runs: the ones of S segments.
            targets: (S,) the mask that each segment belongs to; -1: none.
            count: N.
        """
        self.runs = runs
        self.targets = targets
        self.count = count

    @classmethod
    def from_codes(cls, counts: Sequence[str], size: tuple[int, int]) -> "RleSegments":
        """From COCO compressed counts strings of (H, W) masks.

        Raises:
            ValueError: a string is no code, or its runs do not fill H x W pixels.
        """
        return cls(Runs.parse(counts, size), np.arange(len(counts)), len(counts))

    @cached_property
    def layers(self) -> np.ndarray:  # type: ignore[override]
        """(L, H, W), painted on the first access and kept."""
        height, width = self.size
        return self.take(np.arange(height), np.arange(width)).layers

    @property
    def size(self) -> tuple[int, int]:
        return self.runs.size

    def areas(self) -> np.ndarray:
        """(N,) pixels of each mask; without painting as long as no mask is a union of several segments."""
        used = self.targets[self.targets >= 0]
        if len(np.unique(used)) < len(used):
            return super().areas()
        owners = self.targets[self.runs.owners]
        inside = owners >= 0
        areas = np.bincount(owners[inside], (self.runs.ends - self.runs.starts)[inside], minlength=self.count)
        return areas.astype(np.int64)

    def group(self, targets: np.ndarray, count: int) -> "RleSegments":
        """As in the base class; nothing is painted."""
        table = np.append(np.asarray(targets, dtype=np.int64), -1)  # the last entry answers for -1
        return RleSegments(self.runs, table[self.targets], count)

    def take(self, rows: np.ndarray, columns: np.ndarray) -> SegmentMasks:
        """The masks at the given source rows and columns, both in ascending order and repeated where enlarged."""
        kept = self.runs.of(self.targets >= 0).at(rows, columns)
        source_columns, repeats = np.unique(columns, return_counts=True)
        length = len(source_columns) * len(rows)
        if kept.overlap(length):
            flat = paint(kept.extents(), length, len(self.targets))  # each segment its own id, then the unions
            layers = flat.reshape(-1, len(source_columns), len(rows))
            masks = SegmentMasks(layers, len(self.targets)).group(self.targets, self.count)
            layers = masks.layers
        else:
            ids = self.targets[kept.owners] + 1
            layers = kept.painted(ids, length, self.count).reshape(1, len(source_columns), len(rows))
        if len(source_columns) < len(columns):
            layers = np.repeat(layers, repeats, axis=1)
        return SegmentMasks(np.ascontiguousarray(layers.transpose(0, 2, 1)), self.count)  # (L, h, w)


class Runs:
    """Stretches of ones of S segments on a (H, W) canvas that is read column by column.

    Attributes:
        starts, ends: (R,) int64 places in 0..H W; the runs of one segment stand together, in ascending order.
        owners: (R,) segment of each run.
        count: S.
        size: (H, W).
    """

    def __init__(
        self, starts: np.ndarray, ends: np.ndarray, owners: np.ndarray, count: int, size: tuple[int, int]
    ) -> None:
        self.starts, self.ends, self.owners, self.count, self.size = starts, ends, owners, count, size

    @classmethod
    def parse(cls, codes: Sequence[str], size: tuple[int, int]) -> "Runs":
        """All codes at once; where one is broken, the error is that of `decode_rle`."""
        runs = rles_to_runs([{"size": list(size), "counts": code} for code in codes], size)
        owners = np.repeat(np.arange(len(codes)), np.diff(runs.offsets))
        return cls(runs.starts, runs.starts + runs.lengths, owners, len(codes), size)

    def of(self, segments: np.ndarray) -> "Runs":
        """Only the runs of the chosen (S,) bool segments."""
        if segments.all():
            return self
        keep = segments[self.owners]
        return Runs(self.starts[keep], self.ends[keep], self.owners[keep], self.count, self.size)

    def at(self, rows: np.ndarray, columns: np.ndarray) -> "Runs":
        """The runs on the canvas of the given rows and of the *distinct* given columns."""
        height = self.size[0]
        columns = np.unique(columns)
        meets = (self.starts < (columns[-1] + 1) * height) & (self.ends > columns[0] * height)
        starts, ends, owners = self.starts[meets], self.ends[meets], self.owners[meets]
        # A run may go on in the next columns: one piece for each column.
        first, last = starts // height, (ends - 1) // height
        if (last > first).any():
            pieces = last - first + 1
            start_of_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
            column = np.repeat(first, pieces) + np.arange(len(start_of_piece)) - start_of_piece
            starts, ends = np.repeat(starts, pieces), np.repeat(ends, pieces)
            owners = np.repeat(owners, pieces)
        else:
            column = first
        place = np.full(int(columns[-1]) + 2, -1, dtype=np.int64)  # source column -> column of the canvas
        place[columns] = np.arange(len(columns))
        place = place[np.minimum(column, len(place) - 1)]
        below = np.searchsorted(rows, np.arange(height + 1))  # source row -> canvas rows above it
        top = below[np.maximum(starts - column * height, 0)]
        bottom = below[np.minimum(ends - column * height, height)]
        seen = (place >= 0) & (top < bottom)
        offset = place[seen] * len(rows)
        size = (len(rows), len(columns))
        return Runs(offset + top[seen], offset + bottom[seen], owners[seen], self.count, size)

    def overlap(self, length: int) -> bool:
        """Whether two runs share one of the `length` pixels."""
        order = np.argsort(self.starts, kind="stable")
        return bool((self.starts[order][1:] < self.ends[order][:-1]).any())

    def painted(self, ids: np.ndarray, length: int, count: int) -> np.ndarray:
        """(length,) id map of runs that do not overlap; `ids` (R,) are at most `count`."""
        order = np.argsort(self.starts, kind="stable")
        borders = np.zeros(2 * len(order) + 2, dtype=np.int64)  # begin of gap, run, gap, run, ..., gap, and the end
        borders[1:-1:2], borders[2:-1:2], borders[-1] = self.starts[order], self.ends[order], length
        values = np.zeros(2 * len(order) + 1, dtype=id_type(count))
        values[1::2] = ids[order]
        return np.repeat(values, np.diff(borders))

    def extents(self) -> "list[tuple[int, np.ndarray]]":
        """For each segment the place of its first pixel and the (n,) bool mask from there to its last one."""
        parts: list[tuple[int, np.ndarray]] = [(0, np.zeros(0, dtype=bool))] * self.count
        borders = np.searchsorted(self.owners, np.arange(self.count + 1))
        for segment in np.unique(self.owners).tolist():
            runs = slice(borders[segment], borders[segment + 1])
            edges = np.stack([self.starts[runs], self.ends[runs]], axis=1).reshape(-1)
            values = np.arange(len(edges) - 1) % 2 == 0
            parts[segment] = (int(edges[0]), np.repeat(values, np.diff(edges)))
        return parts
