"""Binary masks and their codings: COCO run-length encoding, polygons, panoptic PNG colours.

The run-length code is that of the COCO API (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014):
runs of alternating 0 and 1, starting with 0, over the mask read column by column. Here it is always the dict
`{"size": [H, W], "counts": str}` whose string is byte for byte what pycocotools writes, decoded as ASCII.
The panoptic colour code (R + 256 G + 256^2 B) is that of Kirillov et al., "Panoptic Segmentation", CVPR 2019.

Only numpy and torch are needed; no compiled extension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Polygons are drawn on a grid this many times finer than the pixels, as the COCO API does.
POLYGON_UPSAMPLING = 5
# Segment ids must fit the three bytes of an RGB pixel.
MAX_PANOPTIC_ID = 256**3 - 1
# A count takes 5 bits a character, so 13 characters hold any 64-bit count.
_MAX_CHARACTERS_PER_COUNT = 13


def encode_rle(mask: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """Encode one (H, W) mask; every non-zero pixel counts as 1."""
    array = _to_numpy(mask)
    if array.ndim != 2:
        raise ValueError(f"mask must have shape (H, W), got {array.shape}")
    height, width = array.shape
    return {"size": [int(height), int(width)], "counts": _counts_to_string(_run_lengths(array != 0))}


def encode_rles(masks: np.ndarray | torch.Tensor) -> list[dict[str, Any]]:
    """Encode (N, H, W) masks one by one; N may be 0."""
    if masks.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {tuple(masks.shape)}")
    return [encode_rle(mask) for mask in masks]


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Decode to a (H, W) bool array; `counts` may be a string, bytes or an uncompressed list.

    Raises:
        ValueError: the dict has no size or counts, a count is negative, or the runs do not fill H x W pixels.
    """
    counts, (height, width) = _read_rle(rle)
    values = np.zeros(len(counts), dtype=bool)
    values[1::2] = True
    return np.repeat(values, counts).reshape(width, height).T.copy()  # (H, W)


def decode_rles(rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Decode to (N, H, W) bool; `size` (H, W) must be the size of every mask and gives the shape when N is 0."""
    masks = np.zeros((len(rles), *size), dtype=bool)
    for index, rle in enumerate(rles):
        mask = decode_rle(rle)
        if mask.shape != tuple(size):
            raise ValueError(f"RLE {index} has size {list(mask.shape)}, expected {list(size)}")
        masks[index] = mask
    return masks


def rle_area(rle: dict[str, Any]) -> int:
    """Number of pixels of the mask."""
    counts, _ = _read_rle(rle)
    return int(counts[1::2].sum())


def rle_bbox(rle: dict[str, Any]) -> list[float]:
    """Bounding box [x, y, width, height] in pixels; all zero for an empty mask."""
    counts, (height, _) = _read_rle(rle)
    ends = np.cumsum(counts)[1::2]
    lengths = counts[1::2][: len(ends)]
    starts, ends = (ends - lengths)[lengths > 0], ends[lengths > 0] - 1
    if len(starts) == 0:
        return [0.0, 0.0, 0.0, 0.0]
    left, right = int(starts[0] // height), int(ends[-1] // height)
    top, bottom = int((starts % height).min()), int((ends % height).max())
    if np.any(starts // height < ends // height):  # a run that turns into the next column touches both borders
        top, bottom = 0, height - 1
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Draw polygons [x0, y0, x1, y1, ...] and return their union, (H, W) bool, equal to pycocotools' pixels.

    Raises:
        ValueError: a polygon has fewer than three points, an odd number of values or a value that is not finite.
    """
    mask = np.zeros((height, width), dtype=bool)
    for index, polygon in enumerate(polygons):
        coordinates = np.asarray(polygon, dtype=np.float64)
        if coordinates.ndim != 1 or len(coordinates) < 6 or len(coordinates) % 2:
            raise ValueError(
                f"polygon {index} must be a flat list of at least 3 points (6 values, x and y in turn), "
                f"got shape {coordinates.shape}"
            )
        if not np.isfinite(coordinates).all():
            raise ValueError(f"polygon {index} holds a value that is not finite")
        mask |= _polygon_to_mask(coordinates.reshape(-1, 2), height, width)
    return mask


def segmentation_to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Turn a COCO `segmentation` (list of polygons, RLE or uncompressed RLE) into a (H, W) bool mask.

    Raises:
        ValueError: the RLE has another size than (height, width), or the value is neither of the three forms.
    """
    if isinstance(segmentation, dict):
        mask = decode_rle(segmentation)
        if mask.shape != (height, width):
            raise ValueError(f"RLE has size {list(mask.shape)}, the image has size {[height, width]}")
        return mask
    if isinstance(segmentation, (list, tuple)) and all(isinstance(p, (list, tuple, np.ndarray)) for p in segmentation):
        return polygons_to_mask(segmentation, height, width)
    kind = type(segmentation).__name__
    raise ValueError(f"segmentation must be a list of polygons or an RLE dict with size and counts, got {kind}")


def panoptic_png_to_ids(image: np.ndarray) -> np.ndarray:
    """Turn the (H, W, 3) colours of a panoptic PNG into (H, W) int32 segment ids; id 0 is void."""
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"panoptic PNG must have shape (H, W, 3), got {array.shape}")
    red, green, blue = (array[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 256**2 * blue  # (H, W)


def ids_to_panoptic_png(ids: np.ndarray | torch.Tensor) -> np.ndarray:
    """Turn (H, W) segment ids into the (H, W, 3) uint8 colours of a panoptic PNG."""
    array = _to_numpy(ids).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > MAX_PANOPTIC_ID):
        raise ValueError(f"panoptic ids must be in 0..{MAX_PANOPTIC_ID}, got {array.min()}..{array.max()}")
    return np.stack([array % 256, array // 256 % 256, array // 256**2], axis=-1).astype(np.uint8)  # (H, W, 3)


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the alternating runs of a bool mask in column order, the first one of zeros (maybe 0 long)."""
    pixels = mask.T.reshape(-1)  # (W * H,)
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if len(pixels) and pixels[0]:
        changes = np.concatenate([[0], changes])
    return np.diff(np.concatenate([[0], changes, [len(pixels)]])).astype(np.int64)


def _read_rle(rle: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """Checked run lengths (int64) and (H, W) of an RLE dict in any of its three forms."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(f"RLE must be a dict with size and counts, got {rle!r:.200}")
    height, width = (int(value) for value in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    runs = _string_to_counts(counts) if isinstance(counts, str) else np.asarray(counts, dtype=np.int64).reshape(-1)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"RLE counts cover {int(runs.sum())} pixels, size {[height, width]} has {height * width}")
    return runs, (height, width)


def _counts_to_string(counts: np.ndarray) -> str:
    """COCO's text form: from the fourth on, each count is stored as the difference to the one two places before;
    then 5 bits a character, low bits first, bit 6 says that more follow, and 48 is added."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    characters = np.zeros((len(values), _MAX_CHARACTERS_PER_COUNT), dtype=np.uint8)
    used = np.zeros(characters.shape, dtype=bool)
    open_values = np.ones(len(values), dtype=bool)
    for position in range(_MAX_CHARACTERS_PER_COUNT):
        low_bits = values & 31
        values = values >> 5
        more = open_values & np.where(low_bits & 16, values != -1, values != 0)
        characters[:, position] = low_bits + 32 * more + 48
        used[:, position] = open_values
        open_values = more
        if not more.any():
            break
    return characters[used].tobytes().decode("ascii")


def _string_to_counts(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("ascii", errors="replace"), dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(f"RLE counts are not a COCO string: {text!r:.80}")
    lasts = np.flatnonzero((codes & 32) == 0)  # the character that ends each count
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    if lengths.max() > _MAX_CHARACTERS_PER_COUNT:
        raise ValueError(f"RLE counts are not a COCO string: {text!r:.80}")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(firsts, lengths))
    counts = np.add.reduceat((codes & 31) << shifts, firsts)
    negative = (codes[lasts] & 16) != 0
    counts[negative] -= np.int64(1) << (5 * lengths[negative])
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def _polygon_to_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill one polygon (P, 2). The outline toggles inside/outside down each column; odd parity is inside."""
    corners = np.trunc(POLYGON_UPSAMPLING * points + 0.5).astype(np.int64)
    outline = [_edge_points(start, end) for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
    x, y = np.concatenate(outline).T
    step = np.flatnonzero(x[1:] != x[:-1])  # the outline moves to another fine column between step and step + 1
    column = (np.minimum(x[step], x[step + 1]) + 0.5) / POLYGON_UPSAMPLING - 0.5
    row = (np.minimum(y[step], y[step + 1]) + 0.5) / POLYGON_UPSAMPLING - 0.5
    crosses = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)  # centre line of a pixel column
    column = column[crosses].astype(np.int64)
    row = np.ceil(np.clip(row[crosses], 0, height)).astype(np.int64)
    toggles = np.bincount(column * height + row, minlength=height * width + 1)[: height * width]
    return (np.cumsum(toggles) % 2 == 1).reshape(width, height).T


def _edge_points(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Grid points (P, 2) from start to end, both included, one for each step along the longer axis.

    The shorter coordinate is rounded from the end with the smaller longer coordinate, so that an edge has the same
    points in both directions.
    """
    delta = end - start
    long_axis = 0 if abs(delta[0]) >= abs(delta[1]) else 1
    steps = int(abs(delta[long_axis]))
    if steps == 0:
        return start[None]
    low, high = (start, end) if delta[long_axis] > 0 else (end, start)
    t = np.arange(steps + 1)
    slope = (high[1 - long_axis] - low[1 - long_axis]) / steps
    points = np.empty((steps + 1, 2), dtype=np.int64)
    points[:, long_axis] = low[long_axis] + t
    points[:, 1 - long_axis] = np.trunc(low[1 - long_axis] + slope * t + 0.5).astype(np.int64)
    return points if delta[long_axis] > 0 else points[::-1]
