"""What benchmarks/metrics.py measures on: seeded synthetic scenes, and real references with seeded errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_maskformer.model.masks import decode_rle, encode_rle, ids_to_panoptic_png, panoptic_png_to_ids

SIDE = 1024
INSTANCES = 100
CLASSES = 80
RADII = (15.0, 90.0)
CAMVID_CLASSES = 11


class Ellipses(NamedTuple):
    """Instances of a scene, as drawn or as predicted: every parameter (N,)."""

    rows: np.ndarray
    columns: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray

    def box(self, index: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """Where in the image an instance lies, and its mask (h, w) bool there."""
        row, column, height, width, _ = (float(values[index]) for values in self)
        top, bottom = max(0, int(row - height)), min(SIDE, int(row + height) + 2)
        left, right = max(0, int(column - width)), min(SIDE, int(column + width) + 2)
        y, x = np.ogrid[top:bottom, left:right]
        inside = ((y - row) / height) ** 2 + ((x - column) / width) ** 2 <= 1
        return (slice(top, bottom), slice(left, right)), inside

    def paint(self, values: np.ndarray) -> np.ndarray:
        """(SIDE, SIDE) of the values (N,), later instances above earlier ones; 0 elsewhere."""
        image = np.zeros((SIDE, SIDE), dtype=values.dtype)
        for index, value in enumerate(values):
            place, inside = self.box(index)
            image[place][inside] = value
        return image

    def masks(self) -> np.ndarray:
        """(N, SIDE, SIDE) bool."""
        stack = np.zeros((len(self.rows), SIDE, SIDE), dtype=bool)
        for index in range(len(stack)):
            place, inside = self.box(index)
            stack[index][place] = inside
        return stack

    def codes(self) -> list[dict[str, Any]]:
        """The masks as run-length codes, one dense mask in memory at a time."""
        return [encode_rle(self.one(index).masks()[0]) for index in range(len(self.rows))]

    def one(self, index: int) -> "Ellipses":
        """A scene of one of the instances."""
        return Ellipses(*(values[index : index + 1] for values in self))

    def panoptic(self) -> dict[str, Any]:
        """Entry of PanopticQuality: later instances lie above earlier ones, the rest is void."""
        ids = self.paint(np.arange(1, len(self.rows) + 1, dtype=np.int32))
        areas = np.bincount(ids.ravel(), minlength=len(self.rows) + 1)
        segments = [
            {"id": index + 1, "category_id": int(label), "iscrowd": 0, "area": int(areas[index + 1])}
            for index, label in enumerate(self.labels)
            if areas[index + 1]
        ]
        return {"segmentation": ids, "segments_info": segments}

    def semantic(self) -> np.ndarray:
        """(SIDE, SIDE) uint8 classes, one more than the labels: 0 is background."""
        return self.paint((self.labels + 1).astype(np.uint8))


def synthetic_scene(seed: int, instances: int = INSTANCES) -> tuple[Ellipses, Ellipses]:
    """Reference and prediction: ellipses anywhere, and the same a few pixels and percent off."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.uniform(0, SIDE, size=(2, instances))
    heights, widths = rng.uniform(*RADII, size=(2, instances))
    labels = rng.integers(0, CLASSES, size=instances)
    moved = [values + rng.normal(0, 3, size=instances) for values in (rows, columns)]
    scaled = [values * rng.uniform(0.9, 1.1, size=instances) for values in (heights, widths)]
    return Ellipses(rows, columns, heights, widths, labels), Ellipses(*moved, *scaled, labels)


def instance_entries(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dense prediction and reference of MaskAveragePrecision."""
    reference, prediction = synthetic_scene(seed)
    scores = np.random.default_rng(seed).random(INSTANCES)
    return (
        {"masks": prediction.masks(), "scores": scores, "labels": prediction.labels},
        {"masks": reference.masks(), "labels": reference.labels},
    )


def camvid_maps(data: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prediction and reference (H, W) uint8: the reference, 4 pixels off, without its void."""
    pairs = []
    for path in sorted((data / "camvid" / "val" / "labels").glob("*.png"))[:count]:
        with Image.open(path) as png:
            reference = np.asarray(png)
        prediction = np.roll(reference, (4, 4), axis=(0, 1))
        pairs.append((np.where(prediction < CAMVID_CLASSES, prediction, 0).astype(np.uint8), reference))
    return pairs


def nuclei_panoptic(data: Path, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Prediction and reference of PanopticQuality, labels 0 and 1: the reference's map, 1 pixel off."""
    folder = data / "nuclei" / "val"
    pairs = []
    for annotation in json.loads((folder / "panoptic.json").read_text())["annotations"][:count]:
        with Image.open(folder / "panoptic" / annotation["file_name"]) as png:
            ids = panoptic_png_to_ids(np.asarray(png.convert("RGB")))
        segments = [{**segment, "category_id": segment["category_id"] - 1} for segment in annotation["segments_info"]]
        prediction = {"segmentation": np.roll(ids, (1, 1), axis=(0, 1)), "segments_info": segments}
        pairs.append((prediction, {"segmentation": ids, "segments_info": segments}))
    return pairs


def nuclei_instances(data: Path, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Dense prediction and reference of MaskAveragePrecision: the reference's masks, 1 pixel off, seeded scores."""
    content = json.loads((data / "nuclei" / "val" / "instances.json").read_text())
    pairs = []
    for image in content["images"][:count]:
        codes = [one["segmentation"] for one in content["annotations"] if one["image_id"] == image["id"]]
        masks = np.stack([decode_rle(code) for code in codes])
        labels = np.zeros(len(masks), dtype=np.int64)
        scores = np.random.default_rng(image["id"]).random(len(masks))
        prediction = {"masks": np.roll(masks, (1, 1), axis=(1, 2)), "scores": scores, "labels": labels}
        pairs.append((prediction, {"masks": masks, "labels": labels}))
    return pairs


def write_panoptic_pngs(folder: Path, entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Writes the maps and yields COCO panoptic annotations."""
    folder.mkdir(parents=True)
    for index, entry in enumerate(entries):
        name = f"{index:04d}.png"
        Image.fromarray(ids_to_panoptic_png(entry["segmentation"])).save(folder / name)
        yield {"image_id": index, "file_name": name, "segments_info": entry["segments_info"]}
