"""Objects of one image pasted on another: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for
Instance Segmentation" (CVPR 2021).

Both images have been scaled, cropped and flipped on their own before; each object of the second one is chosen with
probability one half and keeps its place, counted from the top left corner. As in the paper there is no blending,
which it found to change nothing. Departure: the first image keeps its size, and what would fall outside is cut off;
the paper pastes on the padding as well, which here the processor adds later.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segment_masks import SegmentMasks, id_type

COPY_PASTE_STREAM = 1  # beside a sample's own random numbers
OBJECT_PROBABILITY = 0.5  # every subset of the objects is equally likely; the paper says "a random subset"


def paste_probability(given: float | None, augmentation: Any, task: str) -> float:
    """How often objects are pasted: `given`, or what the augmentation says itself; 0 where neither says anything.

    Raises:
        ValueError: it is not in 0..1, or above 0 for the semantic task, whose masks are no objects.
    """
    probability = float(getattr(augmentation, "copy_paste_probability", 0.0) if given is None else given)
    if not 0 <= probability <= 1:
        raise ValueError(f"copy_paste_probability must be in 0..1, got {probability}")
    if probability > 0 and task == "semantic":
        raise ValueError(
            f"copy_paste_probability is {probability}, but the task is semantic, whose masks are no objects; it needs "
            "the task instance or panoptic"
        )
    return probability


def sometimes_paste(
    sample: Sample,
    draw_source: Callable[[np.random.Generator], Sample],
    thing_label_ids: Collection[int],
    probability: float,
    state: list[int],
) -> Sample:
    """`sample`, or with `probability` the sample with a random subset of another one's things pasted on it.

    Args:
        sample: augmented.
        draw_source: the other sample, augmented with the generator that it is given.
        thing_label_ids: the classes whose masks are objects.
        probability: 0..1.
        state: the random state of the sample. Pasting has a stream of its own behind it, so that samples stay what
            they are without it.
    """
    if probability == 0:
        return sample
    rng = np.random.default_rng([*state, COPY_PASTE_STREAM])
    if rng.random() >= probability:
        return sample
    source = draw_source(rng)
    return paste_objects(sample, source, choose_objects(source, thing_label_ids, rng))


def choose_objects(sample: Sample, thing_label_ids: Collection[int], rng: np.random.Generator) -> np.ndarray:
    """(N,) bool: a random subset of the sample's things; crowds and stuff are never chosen."""
    things = np.isin(sample.class_labels, list(thing_label_ids)) & ~sample.iscrowd
    return things & (rng.random(len(things)) < OBJECT_PROBABILITY)


def paste_objects(sample: Sample, source: Sample, chosen: np.ndarray) -> Sample:
    """`sample` with the `chosen` (N,) bool objects of `source` in front of everything.

    Every mask of `sample` loses the pixels that are covered now; masks without a pixel left are removed. The pasted
    objects come last, in their order, and may overlap each other as they did.
    """
    height, width = (min(*sides) for sides in zip(sample.segments.size, source.segments.size, strict=True))
    corner = np.s_[:height, :width]
    pasted = source.segments.select(chosen).layers[:, :height, :width]  # (P, h, w)
    covered = (pasted > 0).any(axis=0)
    if not covered.any():
        return sample
    image = sample.image.copy()
    image[corner][covered] = source.image[corner][covered]

    count = len(sample.segments)
    total = count + int(chosen.sum())
    below = sample.segments.layers
    layers = np.zeros((max(len(below), len(pasted)), *sample.segments.size), dtype=id_type(total))
    layers[: len(below)] = below
    layers[:, :height, :width][:, covered] = 0
    for layer, ids in zip(layers, pasted, strict=False):  # covered pixels are free in every layer now
        inside = ids > 0
        layer[corner][inside] = ids[inside].astype(layer.dtype) + count
    merged = Sample(
        image=image,
        masks=SegmentMasks(layers, total),
        class_labels=np.concatenate([sample.class_labels, source.class_labels[chosen]]),
        iscrowd=np.concatenate([sample.iscrowd, source.iscrowd[chosen]]),
        image_id=sample.image_id,
        file_name=sample.file_name,
    )
    return merged.with_masks(image, merged.segments)
