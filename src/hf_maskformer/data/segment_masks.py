"""The masks of one image, held as few id maps: one as long as no two masks overlap, more only where they do.

An id map is N times smaller than N masks, and cropping, flipping and resizing it costs the same for 3 or 300 segments.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np

from hf_maskformer.model.masks import decode_rle

PIXELS_AT_ONCE = 2**16  # that numpy counts at once


class SegmentMasks:
    """N masks of one image of size (H, W), in L layers.

    Attributes:
        layers: (L, H, W) integers, L >= 1: 0 = nothing, k + 1 = segment k. Segments that overlap stand in different
            layers; no pixel holds the same segment twice.
        count: N; a segment may be without pixels.
    """

    def __init__(self, layers: np.ndarray, count: int) -> None:
        if layers.ndim != 3 or len(layers) == 0:
            raise ValueError(f"layers must have shape (L, H, W) with L >= 1, got {layers.shape}")
        self.layers = layers
        self.count = count

    @classmethod
    def from_id_map(cls, id_map: np.ndarray, count: int) -> "SegmentMasks":
        """From (H, W) integers: 0 = nothing, k + 1 = segment k of `count`."""
        return cls(id_map.astype(id_type(count))[None], count)

    @classmethod
    def from_masks(cls, masks: np.ndarray) -> "SegmentMasks":
        """From (N, H, W) masks; any non-zero value is inside."""
        masks = np.asarray(masks)
        if masks.ndim != 3:
            raise ValueError(f"masks must have shape (N, H, W), got {masks.shape}")
        count, height, width = masks.shape
        layers = paint((_extent(mask.reshape(-1) != 0) for mask in masks), height * width, count)
        return cls(layers.reshape(-1, height, width), count)

    @classmethod
    def from_rles(cls, rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> "SegmentMasks":
        """From COCO RLE dicts that all have `size` (H, W)."""
        height, width = size
        layers = paint((_extent(_column_order(rle, size)) for rle in rles), height * width, len(rles))
        return cls(layers.reshape(-1, width, height).transpose(0, 2, 1), len(rles))  # (L, H, W)

    def __len__(self) -> int:
        return self.count

    @property
    def size(self) -> tuple[int, int]:
        return int(self.layers.shape[1]), int(self.layers.shape[2])

    def dense(self) -> np.ndarray:
        """(N, H, W) bool."""
        ids = np.arange(1, self.count + 1, dtype=self.layers.dtype)[:, None, None]
        masks = self.layers[0] == ids  # (N, H, W)
        for layer in self.layers[1:]:
            for index in np.unique(layer[layer > 0]).astype(np.int64) - 1:
                masks[index] |= layer == index + 1
        return masks

    def top_map(self) -> np.ndarray:
        """(H, W) int64 id map; where segments overlap, the later one is on top."""
        return self.layers.max(axis=0).astype(np.int64)

    def areas(self) -> np.ndarray:
        """(N,) pixels of each segment."""
        return sum((_count_ids(layer, self.count) for layer in self.layers), start=np.zeros(self.count, np.int64))

    def __iter__(self) -> Iterator[np.ndarray]:
        """The N masks, (H, W) bool, one after the other, so that no more than one is in memory."""
        seen = [_count_ids(layer, self.count) > 0 for layer in self.layers]
        for index in range(self.count):
            parts = [layer == index + 1 for layer, holds in zip(self.layers, seen, strict=True) if holds[index]]
            yield reduce(np.logical_or, parts) if parts else np.zeros(self.size, dtype=bool)

    def take(self, rows: np.ndarray, columns: np.ndarray) -> "SegmentMasks":
        """The masks at the given rows and columns; an index may occur more than once."""
        return self.apply(lambda layers: layers[:, rows][:, :, columns])

    def apply(self, transform: Callable[[np.ndarray], np.ndarray]) -> "SegmentMasks":
        """The masks after a nearest-neighbour transform of the last two axes (crop, flip, index)."""
        return SegmentMasks(_without_empty(transform(self.layers)), self.count)

    def group(self, targets: np.ndarray, count: int) -> "SegmentMasks":
        """Merges segments: segment k goes to group `targets[k]`; -1 drops it. A group is the union of its masks."""
        table = np.zeros(self.count + 1, dtype=id_type(count))
        table[1:] = np.asarray(targets) + 1
        layers = table[self.layers]  # (L, H, W)
        for upper in range(1, len(layers)):
            for lower in range(upper):
                layers[upper][layers[upper] == layers[lower]] = 0
        return SegmentMasks(_without_empty(layers), count)

    def select(self, keep: np.ndarray) -> "SegmentMasks":
        """Only the segments where `keep` (N,) bool is true, in order."""
        return self.group(np.where(keep, np.cumsum(keep) - 1, -1), int(np.sum(keep)))


def id_type(count: int) -> type[np.integer[Any]]:
    """The smallest one: one byte is enough for most images, two for nearly every one, and both are fast."""
    return np.uint8 if count < 2**8 else np.uint16 if count < 2**16 else np.int32


def _count_ids(layer: np.ndarray, count: int) -> np.ndarray:
    """(count,) pixels of the ids 1..count in (H, W), some rows at a time, for numpy needs 8 bytes for each pixel."""
    rows = max(1, PIXELS_AT_ONCE // max(1, layer.shape[1]))
    total = np.zeros(count + 1, dtype=np.int64)
    for first in range(0, len(layer), rows):
        total += np.bincount(layer[first : first + rows].reshape(-1), minlength=count + 1)
    return total[1:]


def _without_empty(layers: np.ndarray) -> np.ndarray:
    """Drops the layers that hold nothing, but never the first."""
    if len(layers) == 1:
        return layers
    keep: np.ndarray = np.asarray(layers.any(axis=(1, 2)))
    keep[0] = True
    return layers[keep]


def _column_order(rle: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """(W * H,) bool mask, read down the columns."""
    if tuple(rle["size"]) != tuple(size):
        raise ValueError(f"RLE has size {list(rle['size'])}, the image has size {list(size)}")
    # Read as one long column: the code runs down the columns anyway, and nothing has to be transposed.
    return decode_rle({"size": [size[0] * size[1], 1], "counts": rle["counts"]}).reshape(-1)


def _extent(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """Where the first pixel of a flat mask stands, and the mask from there to its last pixel."""
    first = int(mask.argmax()) if len(mask) else 0
    if not len(mask) or not mask[first]:
        return 0, mask[:0]
    return first, mask[first : len(mask) - int(mask[::-1].argmax())]


def paint(extents: Iterable[tuple[int, np.ndarray]], length: int, count: int) -> np.ndarray:
    """(L, length) layers of `count` flat masks; each goes to the first layer where its pixels are free.

    Each mask is given by the place of its first pixel and the bool values from there on.
    """
    layers = [np.zeros(length, dtype=id_type(count))]
    for number, (first, inside) in enumerate(extents, start=1):
        extent = slice(first, first + len(inside))
        free = (layer[extent] for layer in layers if not np.logical_and(layer[extent], inside).any())
        part: np.ndarray | None = next(free, None)
        if part is None:
            layers.append(np.zeros_like(layers[0]))
            part = layers[-1][extent]
        part[inside] = number  # a view: writes into its layer
    return np.stack(layers)  # (L, length)
