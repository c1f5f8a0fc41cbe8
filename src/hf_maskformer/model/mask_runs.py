"""Masks as runs of ones, and the text form of their lengths in the COCO API.

A run is a stretch of ones over the pixels of an (H, W) mask read column by column. The text form is that of the COCO
API (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014), byte for byte; all masks of an image are
written in one pass.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

# A count takes 5 bits a character, so 13 characters hold any 64-bit count.
MAX_CHARACTERS_PER_COUNT = 13


@dataclass(frozen=True)
class MaskRuns:
    """N masks of one size as runs of ones over the pixels read column by column.

    Attributes:
        starts: (R,) int64 first pixel of each run; runs of one mask stand together, ascend and do not touch.
        lengths: (R,) int64, at least 1.
        offsets: (N + 1,) int64; mask n has the runs offsets[n] to offsets[n + 1].
        size: (H, W).
    """

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    size: tuple[int, int]

    @classmethod
    def from_owners(
        cls, owners: np.ndarray, starts: np.ndarray, lengths: np.ndarray, count: int, size: tuple[int, int]
    ) -> "MaskRuns":
        """Groups runs, ascending in each mask, by the mask 0..count-1 that owns each of them."""
        order = np.argsort(owners, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=count))])
        return cls(starts[order], lengths[order], offsets, size)

    def rles(self) -> list[dict[str, Any]]:
        """The code of each mask."""
        pixels = self.size[0] * self.size[1]
        numbers = np.diff(self.offsets)
        ends = self.starts + self.lengths
        filled = numbers > 0
        before = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        before[self.offsets[:-1][filled]] = 0
        rests = np.full(len(numbers), pixels)
        rests[filled] -= ends[self.offsets[1:][filled] - 1]
        has_rest = (rests > 0) | ~filled
        bounds = np.concatenate([[0], np.cumsum(2 * numbers + has_rest)])
        places = 2 * np.arange(len(ends)) + np.repeat(bounds[:-1] - 2 * self.offsets[:-1], numbers)
        counts = np.empty(bounds[-1], dtype=np.int64)
        counts[places] = self.starts - before
        counts[places + 1] = self.lengths
        counts[bounds[1:][has_rest] - 1] = rests[has_rest]
        return [{"size": list(self.size), "counts": text} for text in counts_to_strings(counts, bounds)]

    def areas(self) -> np.ndarray:
        """(N,) int64 numbers of pixels."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(sums[self.offsets])

    def boxes(self) -> np.ndarray:
        """(N, 4) float64 boxes [x, y, width, height] in pixels; all zero for an empty mask."""
        boxes = np.zeros((len(self.offsets) - 1, 4))
        filled = np.flatnonzero(np.diff(self.offsets))
        if len(filled) == 0:
            return boxes
        height, firsts = self.size[0], self.offsets[filled]
        lasts = self.starts + self.lengths - 1
        left, right = self.starts[firsts] // height, lasts[self.offsets[filled + 1] - 1] // height
        turns = self.starts // height < lasts // height  # into the next column: the run touches both borders
        top = np.minimum.reduceat(np.where(turns, 0, self.starts % height), firsts)
        bottom = np.maximum.reduceat(np.where(turns, height - 1, lasts % height), firsts)
        boxes[filled] = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1)
        return boxes


def counts_to_runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the ones among alternating counts; empty runs and gaps are taken out."""
    lengths = counts[1::2]
    starts = np.cumsum(counts)[: 2 * len(lengths) : 2]
    if (counts[1:] > 0).all():
        return starts, lengths
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    apart = np.ones(len(starts) + 1, dtype=bool)
    apart[1:-1] = starts[1:] > starts[:-1] + lengths[:-1]
    firsts, lasts = np.flatnonzero(apart[:-1]), np.flatnonzero(apart[1:])
    return starts[firsts], starts[lasts] + lengths[lasts] - starts[firsts]


def counts_to_strings(counts: np.ndarray, bounds: np.ndarray) -> list[str]:
    """COCO's text form of lists of counts that stand one after the other; list n is bounds[n] to bounds[n + 1].

    From the fourth on, each count is stored as the difference to the one two places before; then 5 bits a character,
    low bits first, bit 6 says that more follow, and 48 is added.
    """
    values = counts.copy()
    place = np.arange(len(counts)) - np.repeat(bounds[:-1], np.diff(bounds))
    values[2:] -= np.where(place[2:] >= 3, counts[:-2], 0)
    magnitudes = np.where(values < 0, ~values, values) >> 4  # what one character cannot hold beside the sign
    lengths = np.ones(len(values), dtype=np.int64)
    while magnitudes.any():
        lengths += magnitudes > 0
        magnitudes >>= 5
    cuts = np.concatenate([[0], np.cumsum(lengths)])
    characters = np.empty(cuts[-1], dtype=np.uint8)
    places = cuts[:-1]
    while len(places):  # one character of all values that have so many, at a time
        more = lengths > 1
        characters[places] = (values & 31) + 48 + 32 * more
        values, places, lengths = values[more] >> 5, places[more] + 1, lengths[more] - 1
    text = characters.tobytes().decode("ascii")
    return [text[start:end] for start, end in pairwise(cuts[bounds].tolist())]


def strings_to_runs(texts: list[str], pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(starts, lengths, offsets) as in `MaskRuns` of many texts in one pass.

    None if one of them is broken, does not fill the pixels or has empty runs: then they must be read one by one.
    """
    codes = np.frombuffer("".join(texts).encode("ascii", errors="replace"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.cumsum([len(text) for text in texts])
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or (codes[ends - 1] & 32).any():
        return None
    lasts = np.flatnonzero((codes & 32) == 0)
    counts, longest = _sum_characters(codes, lasts)
    bounds = np.concatenate([[0], np.searchsorted(lasts, ends)])  # counts of the texts before
    if longest > MAX_CHARACTERS_PER_COUNT or (np.diff(bounds) < 1).any():
        return None
    place = np.arange(len(counts)) - np.repeat(bounds[:-1], np.diff(bounds))
    for parity in (1, 0):
        chosen = np.flatnonzero((place % 2 == parity) & (place > 0))
        sums = np.cumsum(counts[chosen])
        first = np.searchsorted(chosen, bounds[:-1])  # where each text begins among the chosen
        before = np.concatenate([[0], sums])[first]
        counts[chosen] = sums - np.repeat(before, np.diff(first, append=len(chosen)))
    filled = np.cumsum(counts)
    if (counts[place > 0] <= 0).any() or (counts < 0).any():
        return None
    if (filled[bounds[1:] - 1] != pixels * np.arange(1, len(texts) + 1)).any():
        return None
    ones = np.flatnonzero(place % 2)
    offsets = np.concatenate([[0], np.cumsum(np.diff(bounds) // 2)])
    return filled[ones - 1] - np.repeat(pixels * np.arange(len(texts)), np.diff(offsets)), counts[ones], offsets


def string_to_counts(text: str) -> np.ndarray:
    """Inverse of `counts_to_strings` for one text; ValueError if it is none."""
    codes = np.frombuffer(text.encode("ascii", errors="replace"), dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(f"RLE counts are not a COCO string: {text!r:.80}")
    lasts = np.flatnonzero((codes & 32) == 0)  # the character that ends each count
    counts, longest = _sum_characters(codes, lasts)
    if longest > MAX_CHARACTERS_PER_COUNT:
        raise ValueError(f"RLE counts are not a COCO string: {text!r:.80}")
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def _sum_characters(codes: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, int]:
    """The stored number that each group of characters means, and the length of the longest group."""
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(firsts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, firsts)
    negative = (codes[lasts] & 16) != 0
    numbers[negative] -= np.int64(1) << (5 * lengths[negative])
    return numbers, int(lengths.max())
