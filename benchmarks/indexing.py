"""How long a dataset takes to be indexed: 1,000 images with COCO annotations, made here, and nuclei where it is there.

    python benchmarks/indexing.py [--images N] [--data DIR] [--json FILE]

The made images are 640x480 JPEGs with about 7 polygons of 20 to 60 points each; every tenth image has a crowd as a
run-length code. Each split is indexed from nothing (a fresh cache) and opened a second time from the cache.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_maskformer.data.load import load
from hf_maskformer.model.masks import encode_rle

HEIGHT, WIDTH = 480, 640
CATEGORIES = 80
MEAN_OBJECTS = 7
CROWD_EVERY = 10
ROOT = Path(__file__).resolve().parent.parent


def make_coco(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes a COCO instance split `train` and returns the dataset's folder."""
    rng = np.random.default_rng(seed)
    images = folder / "train" / "images"
    images.mkdir(parents=True)
    pixels = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((WIDTH, HEIGHT))
    picture.save(images / "000001.jpg")
    content = (images / "000001.jpg").read_bytes()
    records, annotations = [], []
    for image_id in range(1, count + 1):
        name = f"{image_id:06d}.jpg"
        (images / name).write_bytes(content)
        records.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for _ in range(1 + int(rng.poisson(MEAN_OBJECTS - 1))):
            annotations.append(_polygon_annotation(rng, image_id))
        if image_id % CROWD_EVERY == 0:
            annotations.append(_crowd_annotation(rng, image_id))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)]
    table = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "train" / "instances.json").write_text(json.dumps(table))
    return folder


def _polygon_annotation(rng: np.random.Generator, image_id: int) -> dict[str, Any]:
    """A wavy ellipse; one in eight has a second part, as an object behind a pole."""
    polygons = []
    for _ in range(1 + int(rng.random() < 0.125)):
        points = int(rng.integers(20, 61))
        angles = np.sort(rng.uniform(0, 2 * np.pi, points))
        radius = np.exp(rng.uniform(np.log(8), np.log(160))) * rng.uniform(0.7, 1.0, points)
        x = np.clip(rng.uniform(0, WIDTH) + radius * np.cos(angles), 0, WIDTH)
        y = np.clip(rng.uniform(0, HEIGHT) + radius * np.sin(angles), 0, HEIGHT)
        polygons.append(np.stack([x, y], axis=1).round(2).reshape(-1).tolist())
    values = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    (left, top), (right, bottom) = values.min(axis=0).tolist(), values.max(axis=0).tolist()
    return {
        "image_id": image_id,
        "category_id": int(rng.integers(1, CATEGORIES + 1)),
        "segmentation": polygons,
        "area": 1.0,
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
    }


def _crowd_annotation(rng: np.random.Generator, image_id: int) -> dict[str, Any]:
    blocks = rng.random((HEIGHT // 20, WIDTH // 20)) < 0.1
    mask = np.kron(blocks, np.ones((20, 20), dtype=bool))
    mask[0, 0] = True
    code = encode_rle(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [0, 0, int(columns[-1]) + 1, int(rows[-1]) + 1]
    return {
        "image_id": image_id,
        "category_id": 1,
        "segmentation": code,
        "area": int(mask.sum()),
        "bbox": box,
        "iscrowd": 1,
    }


def time_indexing(folder: Path, split: str, task: str | None = None) -> dict[str, Any]:
    """Seconds of wall clock and of one process's CPU for a first and for a second opening."""
    with tempfile.TemporaryDirectory() as cache:
        start, start_cpu = time.perf_counter(), time.process_time()
        data = load(folder, split=split, task=task, cache_dir=cache)
        cold, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        segments = sum(map(len, data.dataset.select_columns("segments")["segments"]))
        start = time.perf_counter()
        load(folder, split=split, task=task, cache_dir=cache)
        warm = time.perf_counter() - start
    times = {"cold_s": round(cold, 3), "cold_cpu_s": round(cpu, 3), "cached_s": round(warm, 3)}
    return {"format": data.format, "images": len(data), "segments": segments, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds nuclei/")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "indexing.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_coco(Path(folder), arguments.images)
        rows.append({"dataset": "made COCO instance", **time_indexing(Path(folder), "train")})
    if (arguments.data / "nuclei").is_dir():
        for task in ("panoptic", "instance"):
            rows.append({"dataset": f"nuclei {task}", **time_indexing(arguments.data / "nuclei", "train", task)})
    columns = list(rows[0])
    print("  ".join(f"{name:>18}" for name in columns))
    for row in rows:
        print("  ".join(f"{row[name]!s:>18}" for name in columns))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"cores": len(os.sched_getaffinity(0)), "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
