"""Inputs of the metrics that were also given to their peers: seeded random ones and real ones with seeded errors.

Everything is drawn from `np.random.RandomState`, whose stream numpy keeps as it is, and made with whole numbers, so
that every machine builds the same inputs; `digest` of a case stands beside what the peer said about it.
A group is a small data set: five cases that share their settings. A case is one image: prediction and reference.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_maskformer.model.masks import decode_rle, panoptic_png_to_ids

GROUP_SIZE = 5
RANDOM_GROUPS = 48  # 240 cases
REAL_GROUPS = 12  # 60 cases
VOID = 255
NUCLEI_CLASSES = 2  # of the panoptic files: nucleus and background


class Group(NamedTuple):
    """A small data set."""

    settings: dict[str, Any]  # arguments of the metric
    cases: list[tuple[Any, Any]]  # prediction and reference of each image


def digest(value: Any) -> str:
    """Short hash of arrays, dicts, lists and plain values; it does not depend on an array's integer width."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        kind = {"b": "|u1", "i": "<i8", "u": "<i8", "f": "<f8"}[value.dtype.kind]
        state.update(f"{kind}{value.shape}".encode())
        state.update(np.ascontiguousarray(value, dtype=kind).tobytes())
    elif isinstance(value, dict):
        for key in sorted(value):
            state.update(str(key).encode())
            _feed(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"list{len(value)}".encode())
        for entry in value:
            _feed(state, entry)
    else:
        state.update(repr(value).encode())


def random_groups(family: str) -> Iterator[Group]:
    """The 240 random cases of "semantic", "panoptic", "instances", "volumes" or "masks"."""
    for index in range(RANDOM_GROUPS):
        yield RANDOM[family](np.random.RandomState(1000 * list(RANDOM).index(family) + index), index)


def real_groups(family: str, shared_data: Path) -> Iterator[Group]:
    """The 60 real cases of a family: labels of a validation set as references, the same with errors as predictions."""
    cases = REAL[family](np.random.RandomState(10_000 + list(REAL).index(family)), shared_data)
    settings = {
        "semantic": {"num_labels": 11, "ignore_index": VOID},
        "panoptic": {"num_labels": NUCLEI_CLASSES, "thing_label_ids": [0]},
        "instances": {"num_labels": 1},
        "volumes": {"num_labels": 3},
        "masks": {"dilation_ratio": 0.02},
    }[family]
    for _ in range(REAL_GROUPS):
        yield Group(settings, [next(cases) for _ in range(GROUP_SIZE)])


# --- pieces ----------------------------------------------------------------------------------------------------------


def regions(rng: np.random.RandomState, shape: Sequence[int], count: int) -> np.ndarray:
    """Array of `shape` with values 0..count - 1: each place has the number of the nearest of `count` random points."""
    grid = np.indices(shape).reshape(len(shape), 1, -1)  # (axes, 1, P)
    points = np.stack([rng.randint(0, size, count) for size in shape])[:, :, None]  # (axes, count, 1)
    return ((grid - points) ** 2).sum(axis=0).argmin(axis=0).reshape(shape)


def box(rng: np.random.RandomState, shape: Sequence[int]) -> tuple[slice, ...]:
    """A random box of up to a half of each side."""
    starts = [rng.randint(0, size) for size in shape]
    return tuple(
        slice(start, start + rng.randint(1, size // 2 + 2)) for start, size in zip(starts, shape, strict=True)
    )


def grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask and its neighbours along each axis, `steps` times."""
    for _ in range(steps):
        larger = mask.copy()
        for axis in range(mask.ndim):
            target, values = np.moveaxis(larger, axis, 0), np.moveaxis(mask, axis, 0)
            target[1:] |= values[:-1]
            target[:-1] |= values[1:]
        mask = larger
    return mask


def moved(array: np.ndarray, offsets: Sequence[int]) -> np.ndarray:
    """The array rolled along each axis."""
    return np.roll(array, tuple(offsets), tuple(range(array.ndim)))


def with_errors(rng: np.random.RandomState, labels: np.ndarray, values: Sequence[int], most: int = 5) -> np.ndarray:
    """Labels with up to `most - 1` errors: moved, a box relabelled, a value lost, noise, a value grown."""
    labels, values = labels.copy(), np.asarray(values)
    for _ in range(rng.randint(0, most)):
        error, one, other = rng.randint(5), rng.choice(values), rng.choice(values)
        if error == 0:
            labels = moved(labels, rng.randint(-2, 3, labels.ndim))
        elif error == 1:
            labels[box(rng, labels.shape)] = one
        elif error == 2:
            labels[labels == one] = other
        elif error == 3:
            wrong = rng.random_sample(labels.shape) < 0.02
            labels[wrong] = rng.choice(values, int(wrong.sum()))
        else:
            labels[grown(labels == one, rng.randint(1, 3))] = one
    return labels


# --- random cases ----------------------------------------------------------------------------------------------------


def random_semantic(rng: np.random.RandomState, index: int) -> Group:
    num_labels = rng.randint(1, 13)
    cases = []
    for number in range(GROUP_SIZE):
        shape = rng.randint(16, 97, 2)
        labels = rng.randint(0, num_labels, 12)[regions(rng, shape, rng.randint(1, 12))]
        prediction = with_errors(rng, labels, range(num_labels))
        for _ in range(rng.randint(0, 3)):
            labels[box(rng, shape)] = VOID
        if rng.randint(3) == 0:  # a strip of void between the regions
            labels[:, rng.randint(0, shape[1])] = VOID
        if index % 16 == 0 and number == 0:
            labels[:] = VOID
        if number % 2:  # what is predicted on void does not matter, void itself neither
            prediction[labels == VOID] = VOID
        cases.append((prediction, labels))
    return Group({"num_labels": num_labels, "ignore_index": VOID}, cases)


def random_panoptic(rng: np.random.RandomState, index: int) -> Group:
    num_labels = rng.randint(2, 7)
    things = np.flatnonzero(rng.randint(0, 2, num_labels)).tolist()
    cases = []
    for number in range(GROUP_SIZE):
        shape = rng.randint(16, 97, 2)
        # Ids far above the categories': boundary-iou-api marks inner pixels with the number after the last category,
        # and takes them for the segment that has it as its id.
        ids = 1000 + rng.permutation(60_000)[:12]
        ids[rng.randint(0, 12)] = 2**24 - 1
        labels = rng.randint(0, num_labels, 12)
        reference = ids[regions(rng, shape, rng.randint(1, 12))]
        prediction = with_errors(rng, reference, [0, *ids])
        for _ in range(rng.randint(0, 3)):
            reference[box(rng, shape)] = 0
        if index % 16 == 0 and number < 2:
            (reference if number else prediction)[:] = 0
        crowd = np.isin(labels, things) & (rng.randint(0, 6, 12) == 0)
        other = np.where(rng.randint(0, 8, 12) == 0, rng.randint(0, num_labels, 12), labels)
        unseen = ids[0] if rng.randint(10) == 0 else None  # a segment without a pixel: a miss
        reference_entry = panoptic_entry(reference, ids, labels, crowd, listed=unseen)
        cases.append((panoptic_entry(prediction, ids, other, np.zeros(12, dtype=bool)), reference_entry))
    return Group({"num_labels": num_labels, "thing_label_ids": things}, cases)


def panoptic_entry(
    segmentation: np.ndarray, ids: np.ndarray, labels: np.ndarray, crowd: np.ndarray, listed: int | None = None
) -> dict[str, Any]:
    """A panoptic map with the segments that have pixels, and the one with id `listed`."""
    present = np.isin(ids, np.append(segmentation, -1 if listed is None else listed))
    infos = [
        {"id": int(number), "label_id": int(label), "iscrowd": int(flag)}
        for number, label, flag in zip(ids[present], labels[present], crowd[present], strict=True)
    ]
    return {"segmentation": segmentation, "segments_info": infos}


def random_instances(rng: np.random.RandomState, index: int) -> Group:
    num_labels = rng.randint(1, 5)
    cases = []
    for number in range(GROUP_SIZE):
        shape = rng.randint(64, 161, 2) if index % 4 == 0 else rng.randint(16, 97, 2)
        count = rng.randint(0, 9) if number else rng.randint(0, 2)
        masks = np.array([blob(rng, shape) for _ in range(count)]).reshape(count, *shape)
        labels = rng.randint(0, num_labels, count)
        reference = {"masks": masks, "labels": labels, "iscrowd": rng.randint(0, 6, count) == 0}
        if rng.randint(3) == 0:
            reference["area"] = np.round(masks.sum(axis=(1, 2)) * rng.uniform(0.5, 1.5, count), 1)
        if index % 12 == 1:  # areas at both ends of a size range
            reference["area"] = np.full(count, [1024.0, 9216.0, 20000.0, 0.0][number % 4])
        copies = 100 if index % 12 == 0 and number == 4 else rng.randint(1, 3)  # more than COCO counts in an image
        prediction = detections(rng, masks, labels, num_labels, copies)
        cases.append((prediction, reference))
    return Group({"num_labels": num_labels}, cases)


def blob(rng: np.random.RandomState, shape: Sequence[int]) -> np.ndarray:
    """An ellipse or a box (H, W) bool, now and then cut by the border, seldom empty."""
    rows, columns = np.indices(shape)
    height, width = rng.randint(1, shape[0] // 2 + 2), rng.randint(1, shape[1] // 2 + 2)
    row, column = rng.randint(0, shape[0]), rng.randint(0, shape[1])
    if rng.randint(40) == 0:
        return np.zeros(shape, dtype=bool)
    if rng.randint(3) == 0:
        return (abs(rows - row) <= height // 2) & (abs(columns - column) <= width // 2)
    return ((rows - row) * width) ** 2 + ((columns - column) * height) ** 2 <= (height * width) ** 2


def detections(
    rng: np.random.RandomState, masks: np.ndarray, labels: np.ndarray, num_labels: int, copies: int
) -> dict[str, Any]:
    """Detections of the given masks with errors: some lost, some twice, some of nothing; scores with many ties."""
    found, classes = [], []
    for mask, label in zip(masks, labels, strict=True):
        for _ in range(rng.randint(0, copies + 1)):
            error = rng.randint(4)
            changed = moved(mask, rng.randint(-2, 3, 2)) if error < 2 else mask
            if error == 2:
                changed = grown(mask, rng.randint(1, 3))
            elif error == 3 and rng.randint(2):
                changed = ~grown(~mask, rng.randint(1, 3))
            found.append(changed)
            classes.append(label if rng.randint(8) else rng.randint(0, num_labels))
    for _ in range(rng.randint(0, 3)):
        found.append(blob(rng, masks.shape[1:]))
        classes.append(rng.randint(0, num_labels))
    order = rng.permutation(len(found))
    return {
        "masks": np.array(found, dtype=bool).reshape(len(found), *masks.shape[1:])[order],
        "labels": np.array(classes, dtype=np.int64)[order],
        "scores": rng.randint(0, 11, len(found)) / 10.0,
    }


def random_volumes(rng: np.random.RandomState, index: int) -> Group:
    num_labels = rng.randint(2, 5)
    cases = []
    for _ in range(GROUP_SIZE):
        shape = rng.randint(1, 21, 3 if index % 3 else 2)
        labels = rng.randint(0, num_labels, 8)[regions(rng, shape, rng.randint(1, 8))]
        prediction = with_errors(rng, labels, range(num_labels))
        if rng.randint(4) == 0:
            labels[labels == num_labels - 1] = 0
        spacing = None if rng.randint(5) == 0 else tuple((rng.randint(3, 50, len(shape)) / 10).tolist())
        cases.append((prediction, {"segmentation": labels, "spacing": spacing}))
    return Group({"num_labels": num_labels}, cases)


def random_masks(rng: np.random.RandomState, index: int) -> Group:
    cases = []
    for _ in range(GROUP_SIZE):
        shape = rng.randint(1 if index % 4 == 0 else 16, 97, 2)
        mask = blob(rng, shape) | blob(rng, shape)
        if rng.randint(6) == 0:
            mask = ~mask
        cases.append((with_errors(rng, mask, [False, True]), mask))
    return Group({"dilation_ratio": [0.02, 0.005, 0.05, 0.1][index % 4]}, cases)


# --- real cases ------------------------------------------------------------------------------------------------------


def real_semantic(rng: np.random.RandomState, shared_data: Path) -> Iterator[tuple[Any, Any]]:
    for file in sorted((shared_data / "camvid" / "val" / "labels").glob("*.png"))[: REAL_GROUPS * GROUP_SIZE]:
        labels = np.array(Image.open(file))
        filled = np.where(labels == VOID, rng.randint(0, 11), labels)
        yield with_errors(rng, filled, range(11), most=6), labels


def real_panoptic(rng: np.random.RandomState, shared_data: Path) -> Iterator[tuple[Any, Any]]:
    folder = shared_data / "nuclei" / "val"
    for record in small_images(json.loads((folder / "panoptic.json").read_text())["annotations"], folder):
        reference = panoptic_png_to_ids(np.array(Image.open(folder / "panoptic" / record["file_name"])))
        reference = np.where(reference > 0, reference + 1000, 0)  # for the reason given in random_panoptic
        infos = [
            {"id": info["id"] + 1000, "label_id": info["category_id"] - 1, "iscrowd": info["iscrowd"]}
            for info in record["segments_info"]
        ]
        ids = np.array([info["id"] for info in infos])
        labels = np.array([info["label_id"] for info in infos])
        prediction = with_errors(rng, reference, [0, *ids], most=9)
        yield (
            panoptic_entry(prediction, ids, labels, np.zeros(len(ids), dtype=bool)),
            {"segmentation": reference, "segments_info": infos},
        )


def real_instances(rng: np.random.RandomState, shared_data: Path) -> Iterator[tuple[Any, Any]]:
    """References as the files' run-length codes, predictions as dense masks."""
    for rles, areas in nuclei_instances(shared_data):
        labels = np.zeros(len(rles), dtype=np.int64)
        masks = np.array([decode_rle(rle) for rle in rles], dtype=bool)
        crowd = rng.randint(0, 20, len(rles)) == 0  # the files have none
        reference = {"masks": rles, "labels": labels, "iscrowd": crowd, "area": areas}
        yield detections(rng, masks, labels, 1, copies=1), reference


def real_masks(rng: np.random.RandomState, shared_data: Path) -> Iterator[tuple[Any, Any]]:
    """One nucleus of each image."""
    for rles, _ in nuclei_instances(shared_data):
        mask = decode_rle(rles[rng.randint(len(rles))]).astype(bool)
        yield grown(moved(mask, rng.randint(-2, 3, 2)), rng.randint(0, 3)), mask


def real_volumes(rng: np.random.RandomState, shared_data: Path) -> Iterator[tuple[Any, Any]]:
    """Each volume with three predictions, at its real voxel spacing; axes and spacing as (D, H, W)."""
    import nibabel

    for file in sorted((shared_data / "hippocampus" / "val" / "labels").glob("*.nii.gz")):
        image = nibabel.load(file)
        labels = np.asarray(image.dataobj).astype(np.int64).T
        spacing = tuple(float(step) for step in reversed(image.header.get_zooms()))
        for _ in range(REAL_GROUPS * GROUP_SIZE // 20):
            yield with_errors(rng, labels, range(3), most=6), {"segmentation": labels, "spacing": spacing}


def nuclei_instances(shared_data: Path) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
    """Run-length codes and areas of the nuclei of each small image."""
    folder = shared_data / "nuclei" / "val"
    annotations = json.loads((folder / "instances.json").read_text())["annotations"]
    for record in small_images(json.loads((folder / "panoptic.json").read_text())["annotations"], folder):
        own = [annotation for annotation in annotations if annotation["image_id"] == record["image_id"]]
        yield [one["segmentation"] for one in own], np.array([one["area"] for one in own], dtype=np.float64)


def small_images(records: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The 60 records with the fewest pixels times segments, in the order of the file."""

    def cost(record: dict[str, Any]) -> tuple[int, int]:
        width, height = Image.open(folder / "panoptic" / record["file_name"]).size
        return width * height * len(record["segments_info"]), record["image_id"]

    chosen = {record["image_id"] for record in sorted(records, key=cost)[: REAL_GROUPS * GROUP_SIZE]}
    return [record for record in records if record["image_id"] in chosen]


RANDOM: dict[str, Callable[[np.random.RandomState, int], Group]] = {
    "semantic": random_semantic,
    "panoptic": random_panoptic,
    "instances": random_instances,
    "volumes": random_volumes,
    "masks": random_masks,
}
REAL: dict[str, Callable[[np.random.RandomState, Path], Iterator[tuple[Any, Any]]]] = {
    "semantic": real_semantic,
    "panoptic": real_panoptic,
    "instances": real_instances,
    "volumes": real_volumes,
    "masks": real_masks,
}
