"""Small data sets as the library `datasets` stores them: each kind of truth, in parquet and save_to_disk folders."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_maskformer.model.masks import decode_rle

HEIGHT, WIDTH = 6, 8

NAMES = {0: "road", 1: "car"}

MASKS = np.zeros((3, HEIGHT, WIDTH), dtype=bool)  # two rectangles that share four pixels, and one in the corner
MASKS[0, 0:4, 0:4] = True
MASKS[1, 2:6, 2:6] = True
MASKS[2, 5:, 7:] = True

CLASSES = ClassLabel(names=["cat", "dog"])
OBJECT = {
    "id": Value("int64"),
    "category": CLASSES,
    "segmentation": List(List(Value("float32"))),
    "bbox": List(Value("float32"), length=4),
    "area": Value("float64"),
    "iscrowd": Value("bool"),
}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def cell(array: np.ndarray, name: str | None = None) -> dict[str, Any]:
    return {"bytes": png(array), "path": name}


def photo(number: int = 0) -> dict[str, Any]:
    """A grey RGB image that says its number by its colour and its name."""
    return cell(np.full((HEIGHT, WIDTH, 3), number, dtype=np.uint8), f"{number}.png")


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def objects() -> list[dict[str, Any]]:
    """The three masks as COCO records: a dog over a cat, and a crowd of dogs."""
    boxes = [(0, 0, 4, 4), (2, 2, 6, 6), (7, 5, 8, 6)]
    return [
        {
            "id": 10 + index,
            "category": (1, 0, 1)[index],
            "segmentation": [rectangle(*box)],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": float(MASKS[index].sum()),
            "iscrowd": index == 2,
        }
        for index, box in enumerate(boxes)
    ]


def object_set(count: int = 1) -> Dataset:
    features = Features({"image": Image(), "objects": List(OBJECT)})
    return Dataset.from_list([{"image": photo(n), "objects": objects()} for n in range(count)], features=features)


def semantic_map(number: int = 0) -> np.ndarray:
    """Left half class 0, right half 1, one void pixel; `number` more pixels of class 1."""
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[:, WIDTH // 2 :] = 1
    labels[0, 0] = 255
    labels[1, : number % 4] = 1
    return labels


def semantic_set(count: int = 2) -> Dataset:
    features = Features({"image": Image(), "label": Image()})
    rows = [{"image": photo(n), "label": cell(semantic_map(n))} for n in range(count)]
    return Dataset.from_list(rows, features=features)


def one_row(features: dict[str, Any], **cells: Any) -> Dataset:
    """A set of one photo with further columns."""
    return Dataset.from_list([{"image": photo(), **cells}], features=Features({"image": Image(), **features}))


def parquet_folder(root: Path, shards: int = 1, **splits: Dataset) -> Path:
    """A folder as on the Hub: data/SPLIT-0000n-of-0000N.parquet."""
    (root / "data").mkdir(parents=True)
    for split, data in splits.items():
        count = min(shards, len(data))
        for shard in range(count):
            part = data.shard(num_shards=count, index=shard, contiguous=True)
            part.to_parquet(str(root / "data" / f"{split}-{shard:05d}-of-{count:05d}.parquet"))
    return root


def masks_of(row: dict[str, Any]) -> np.ndarray:
    size = [row["height"], row["width"]]
    return np.stack([decode_rle({"size": size, "counts": segment["rle"]}) for segment in row["segments"]])


def fields_of(row: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(segment[name] for name in names) for segment in row["segments"]]
