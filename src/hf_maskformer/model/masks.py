"""Binary masks and their codings: COCO run-length encoding, polygons, panoptic PNG colours.

The run-length code is that of the COCO API (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014):
runs of alternating 0 and 1, starting with 0, over the mask read column by column. Here it is always the dict
`{"size": [H, W], "counts": str}` whose string is byte for byte what pycocotools writes, decoded as ASCII.
The panoptic colour code (R + 256 G + 256^2 B) is that of Kirillov et al., "Panoptic Segmentation", CVPR 2019.

Most masks are handled as runs of ones over the pixels in that order, which cost what their outline is long.
Only numpy and torch are needed; no compiled extension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .mask_runs import MaskRuns, counts_to_runs, string_to_counts, strings_to_runs
from .polygons import check_polygon, polygon_runs

# Segment ids must fit the three bytes of an RGB pixel.
MAX_PANOPTIC_ID = 256**3 - 1
# Runs of fewer pixels than this on average are written by one numpy call instead of one by one.
_SHORT_RUN = 64


def encode_rle(mask: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """Encode one (H, W) mask; every non-zero pixel counts as 1."""
    array = _to_numpy(mask)
    if array.ndim != 2:
        raise ValueError(f"mask must have shape (H, W), got {array.shape}")
    return runs_to_rle(*_mask_runs(array != 0 if array.dtype != bool else array), array.shape)


def encode_rles(masks: np.ndarray | torch.Tensor) -> list[dict[str, Any]]:
    """Encode (N, H, W) masks one by one; N may be 0."""
    if masks.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {tuple(masks.shape)}")
    return [encode_rle(mask) for mask in masks]


def runs_to_rle(starts: np.ndarray, lengths: np.ndarray, size: tuple[int, ...]) -> dict[str, Any]:
    """Encode runs of ones, ascending and apart from each other, over the column-major pixels of a mask (H, W)."""
    height, width = int(size[0]), int(size[1])
    offsets = np.array([0, len(starts)])
    return MaskRuns(np.asarray(starts), np.asarray(lengths), offsets, (height, width)).rles()[0]


def rle_runs(rle: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) int64 of the runs of ones over the column-major pixels, ascending, none of length 0.

    Raises:
        ValueError: as `decode_rle`.
    """
    counts, _ = _read_rle(rle)
    return counts_to_runs(counts)


def id_map_runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, starts, lengths) of all runs of equal pixels of an (H, W) map, in column-major order."""
    pixels = np.asarray(ids).T.reshape(-1)  # (W * H,)
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])[: len(pixels)]
    return pixels[starts], starts, np.diff(starts, append=len(pixels))


def id_map_to_runs(ids: np.ndarray, wanted: Sequence[int] | np.ndarray) -> MaskRuns:
    """The mask of each wanted id in an (H, W) map of integers, in one pass; an id without pixels gives an empty mask.

    Raises:
        ValueError: the map is not (H, W) integers, or an id is wanted twice.
    """
    array = np.asarray(ids)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"ids must be integers of shape (H, W), got {array.dtype} of shape {array.shape}")
    values, starts, lengths = id_map_runs(array)
    named = np.asarray(wanted, dtype=np.int64).reshape(-1)
    order = np.argsort(named)
    if len(np.unique(named)) != len(named):
        raise ValueError(f"wanted ids must differ, got {named.tolist()}")
    place = np.searchsorted(named[order], values)
    known = np.zeros(len(values), dtype=bool)
    inside = place < len(named)
    known[inside] = named[order[place[inside]]] == values[inside]
    return MaskRuns.from_owners(order[place[known]], starts[known], lengths[known], len(named), array.shape)


def id_map_to_rles(ids: np.ndarray, wanted: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """The code of each wanted id of an (H, W) map of integers; see `id_map_to_runs`."""
    return id_map_to_runs(ids, wanted).rles()


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Decode to a (H, W) bool array; `counts` may be a string, bytes or an uncompressed list.

    Raises:
        ValueError: the dict has no size or counts, a count is negative, or the runs do not fill H x W pixels.
    """
    counts, (height, width) = _read_rle(rle)
    mask = np.zeros((height, width), dtype=bool)
    _write_runs(mask, *counts_to_runs(counts))
    return mask


def decode_rles(rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Decode to (N, H, W) bool; `size` (H, W) must be the size of every mask and gives the shape when N is 0."""
    masks = np.zeros((len(rles), *size), dtype=bool)
    for index, rle in enumerate(rles):
        counts, found = _read_rle(rle)
        if found != tuple(size):
            raise ValueError(f"RLE {index} has size {list(found)}, expected {list(size)}")
        _write_runs(masks[index], *counts_to_runs(counts))
    return masks


def rle_area(rle: dict[str, Any]) -> int:
    """Number of pixels of the mask."""
    counts, _ = _read_rle(rle)
    return int(counts[1::2].sum())


def rle_bbox(rle: dict[str, Any]) -> list[float]:
    """Bounding box [x, y, width, height] in pixels; all zero for an empty mask."""
    return [float(value) for value in rles_to_runs([rle]).boxes()[0]]


def rles_to_runs(rles: Sequence[dict[str, Any]], size: tuple[int, int] | None = None) -> MaskRuns:
    """The runs of masks of one size; `size` (H, W) is needed where there is none.

    Raises:
        ValueError: a broken code (see `decode_rle`), or one of another size.
    """
    if size is not None and rles and all(_is_text_of_size(rle, size) for rle in rles):
        parts = strings_to_runs([rle["counts"] for rle in rles], size[0] * size[1])
        if parts is not None:
            return MaskRuns(*parts, (int(size[0]), int(size[1])))
    runs = []
    for index, rle in enumerate(rles):
        counts, found = _read_rle(rle)
        size = size or found
        if found != tuple(size):
            raise ValueError(f"RLE {index} has size {list(found)}, expected {list(size)}")
        runs.append(counts_to_runs(counts))
    if size is None:
        raise ValueError("there is no RLE, so size must be given")
    offsets = np.cumsum([0, *(len(starts) for starts, _ in runs)])
    empty = [np.zeros(0, dtype=np.int64)]
    starts, lengths = (np.concatenate(empty + [part[axis] for part in runs]) for axis in (0, 1))
    return MaskRuns(starts, lengths, offsets, (int(size[0]), int(size[1])))


def _is_text_of_size(rle: Any, size: tuple[int, int]) -> bool:
    return isinstance(rle, dict) and isinstance(rle.get("counts"), str) and rle.get("size") in (list(size), size)


def polygons_to_runs(groups: Sequence[Sequence[Any]], height: int, width: int) -> MaskRuns:
    """The union of each group of polygons [x0, y0, x1, y1, ...], all groups in one pass.

    Raises:
        ValueError: as `check_polygon`.
    """
    polygons = [check_polygon(polygon, index) for group in groups for index, polygon in enumerate(group)]
    return points_to_runs(polygons, [len(group) for group in groups], height, width)


def points_to_runs(polygons: Sequence[np.ndarray], numbers: Sequence[int], height: int, width: int) -> MaskRuns:
    """As `polygons_to_runs` for checked (P, 2) points, of which the first numbers[0] make up the first mask."""
    filled = np.flatnonzero(numbers)
    groups = np.repeat(np.arange(len(filled)), np.asarray(numbers, dtype=np.int64)[filled])
    owners, starts, ends = polygon_runs(polygons, groups, height, width)
    return MaskRuns.from_owners(filled[owners], starts, ends - starts, len(numbers), (height, width))


def polygons_to_rle(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """Draw polygons [x0, y0, x1, y1, ...] and encode their union, byte for byte as pycocotools does.

    Raises:
        ValueError: a polygon has fewer than three points, an odd number of values or a value that is not finite.
    """
    return polygons_to_runs([polygons], height, width).rles()[0]


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """As `polygons_to_rle`, as a (H, W) bool mask."""
    runs = polygons_to_runs([polygons], height, width)
    mask = np.zeros((height, width), dtype=bool)
    _write_runs(mask, runs.starts, runs.lengths)
    return mask


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Turn a COCO `segmentation` (list of polygons, RLE or uncompressed RLE) into a compressed RLE.

    Raises:
        ValueError: the RLE is broken or has another size than (height, width), or the value is neither of the three.
    """
    if isinstance(segmentation, dict):
        counts, size = _read_rle(segmentation)
        if size != (height, width):
            raise ValueError(f"RLE has size {list(size)}, the image has size {[height, width]}")
        if isinstance(segmentation["counts"], str):
            return {"size": [height, width], "counts": segmentation["counts"]}
        return runs_to_rle(*counts_to_runs(counts), size)
    return polygons_to_rle(list_polygons(segmentation), height, width)


def list_polygons(segmentation: Any) -> Sequence[Any]:
    """The polygons of a COCO `segmentation` that is no RLE; ValueError for anything but a list of lists."""
    if isinstance(segmentation, (list, tuple)) and all(isinstance(p, (list, tuple, np.ndarray)) for p in segmentation):
        return segmentation
    kind = type(segmentation).__name__
    raise ValueError(f"segmentation must be a list of polygons or an RLE dict with size and counts, got {kind}")


def segmentation_to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """As `segmentation_to_rle`, as a (H, W) bool mask."""
    return decode_rle(segmentation_to_rle(segmentation, height, width))


def panoptic_png_to_ids(image: np.ndarray) -> np.ndarray:
    """Turn the (H, W, 3) colours of a panoptic PNG into (H, W) int32 segment ids; id 0 is void."""
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"panoptic PNG must have shape (H, W, 3), got {array.shape}")
    if array.dtype != np.uint8 or array.size == 0:
        red, green, blue = (array[..., channel].astype(np.int32) for channel in range(3))
        return red + 256 * green + 256**2 * blue  # (H, W)
    # A pixel is read as the four bytes from its red on; the fourth is the next pixel's and is masked out. The last
    # pixel has no next one.
    height, width = array.shape[:2]
    pixels = np.ascontiguousarray(array)
    ids = np.empty(height * width, dtype="<u4")
    fours = np.ndarray(height * width - 1, dtype="<u4", buffer=pixels, strides=(3,))
    np.bitwise_and(fours, MAX_PANOPTIC_ID, out=ids[:-1])
    red, green, blue = pixels[-1, -1].tolist()
    ids[-1] = red + 256 * green + 256**2 * blue
    return ids.view("<i4").astype(np.int32, copy=False).reshape(height, width)  # (H, W)


def ids_to_panoptic_png(ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """Turn (H, W) segment ids into the (H, W, 3) uint8 colours of a panoptic PNG."""
    array = _to_numpy(ids).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > MAX_PANOPTIC_ID):
        raise ValueError(f"panoptic ids must be in 0..{MAX_PANOPTIC_ID}, got {array.min()}..{array.max()}")
    return np.stack([array % 256, array // 256 % 256, array // 256**2], axis=-1).astype(np.uint8)  # (H, W, 3)


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _mask_runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the runs of ones of a bool mask; only the columns that hold any are read one by one."""
    height = mask.shape[0]
    columns = np.flatnonzero(mask.any(axis=0))
    if len(columns) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = np.zeros((right - left) * height + 2, dtype=bool)
    pixels[1:-1] = mask[:, left:right].T.reshape(-1)
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])  # in turn the first pixel of a run and the one after its last
    return changes[0::2] + left * height, changes[1::2] - changes[0::2]


def _write_runs(mask: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Sets runs of an (H, W) bool mask that is all False, by way of the columns they lie in."""
    if len(starts) == 0:
        return
    height = mask.shape[0]
    left, right = int(starts[0]) // height, (int(starts[-1] + lengths[-1]) - 1) // height + 1
    shift = left * height
    pixels = np.zeros((right - left) * height, dtype=bool)
    if len(starts) * _SHORT_RUN > len(pixels):
        toggles = np.zeros(len(pixels) + 1, dtype=bool)
        toggles[starts - shift] = True
        toggles[starts + lengths - shift] = True
        np.logical_xor.accumulate(toggles[:-1], out=pixels)
    else:
        for first, end in zip((starts - shift).tolist(), (starts + lengths - shift).tolist(), strict=True):
            pixels[first:end] = True
    mask[:, left:right] = pixels.reshape(right - left, height).T


def _read_rle(rle: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """Checked run lengths (int64) and (H, W) of an RLE dict in any of its three forms."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(f"RLE must be a dict with size and counts, got {rle!r:.200}")
    try:
        height, width = (int(value) for value in rle["size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"RLE size must be [height, width], got {rle['size']!r:.80}") from error
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    if isinstance(counts, str):
        runs = string_to_counts(counts)
    else:
        try:
            runs = np.asarray(counts, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"RLE counts must be a COCO string or whole numbers, got {counts!r:.80}") from error
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"RLE counts cover {int(runs.sum())} pixels, size {[height, width]} has {height * width}")
    return runs, (height, width)
