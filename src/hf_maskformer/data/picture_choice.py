"""Which images of a dataset to look at: together they show every class if they can, from all splits."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.inspection_report import ImageFacts
from hf_maskformer.model.label_spec import LabelSpec

NUM_PICTURES = 8
DRAWN_AT_RANDOM = 24  # images of each split and format that are kept beside the best of each class
SEED = 0


@dataclass(frozen=True)
class Picture:
    """One image to draw: `source` is its row, or its `VolumeItem` for volumes."""

    split: str | None
    format: str
    label_spec: LabelSpec
    file: Path
    source: Any


@dataclass(frozen=True)
class _Candidate:
    picture: Picture
    classes: frozenset[str]
    segments: int
    size: tuple[int, ...]


class PictureChoice:
    """Takes the images one by one and keeps few: of each class the one that shows most of it, and a random sample."""

    def __init__(self) -> None:
        self._best: dict[str, tuple[float, _Candidate]] = {}  # class -> (share of the image, image)
        self._drawn: dict[tuple[str | None, str], list[_Candidate]] = {}
        self._seen: Counter[tuple[str | None, str]] = Counter()
        self._images: Counter[str] = Counter()  # class -> number of images
        self._random = np.random.default_rng(SEED)

    def add(self, picture: Picture, facts: ImageFacts) -> None:
        names = picture.label_spec.id2label
        labels, where = np.unique(facts.labels, return_inverse=True)
        classes = [names[label] for label in labels.tolist()]
        shares = np.bincount(where, weights=facts.pixels, minlength=len(labels)) / np.prod(facts.size)
        candidate = _Candidate(picture, frozenset(classes), len(facts.labels), facts.size)
        self._images.update(classes)
        for name, share in zip(classes, shares.tolist(), strict=True):
            if name not in self._best or share > self._best[name][0]:
                self._best[name] = (share, candidate)
        self._draw(candidate)

    def _draw(self, candidate: _Candidate) -> None:
        """Reservoir sampling: every image of the split has the same chance to be kept."""
        group = (candidate.picture.split, candidate.picture.format)
        self._seen[group] += 1
        drawn = self._drawn.setdefault(group, [])
        if len(drawn) < DRAWN_AT_RANDOM:
            drawn.append(candidate)
            return
        place = int(self._random.integers(self._seen[group]))
        if place < DRAWN_AT_RANDOM:
            drawn[place] = candidate

    def chosen(self) -> tuple[Picture, ...]:
        """First what shows the rarest classes that are not shown yet, then rich images of each split in turn.

        Images of another size come before those of a size that is shown: in a set of several origins it tells them
        apart.
        """
        pool = [candidate for _, candidate in self._best.values()]
        pool += [candidate for drawn in self._drawn.values() for candidate in drawn]
        picked: list[_Candidate] = []
        while len(picked) < NUM_PICTURES:
            taken = {candidate.picture.file for candidate in picked}
            pool = [candidate for candidate in pool if candidate.picture.file not in taken]
            if not pool:
                break
            picked.append(max(pool, key=partial(self._worth, picked)))
        return tuple(candidate.picture for candidate in picked)

    def _worth(self, picked: list[_Candidate], candidate: _Candidate) -> tuple[float, int, bool, int]:
        shown = {name for other in picked for name in other.classes}
        rarity = sum(1 / self._images[name] for name in candidate.classes - shown)
        group = (candidate.picture.split, candidate.picture.format)
        of_group = sum((other.picture.split, other.picture.format) == group for other in picked)
        new_size = all(other.size != candidate.size for other in picked)
        return rarity, -of_group, new_size, candidate.segments
