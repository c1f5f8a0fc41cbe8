"""Small datasets written by hand, in each of the folder shapes."""

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_maskformer.data.hub import load_hub
from hf_maskformer.data.load import find_layouts, open_source
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png

HEIGHT, WIDTH = 6, 8


def _grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((HEIGHT, WIDTH, 3), value, dtype=np.uint8))


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.fixture
def deep_png() -> Callable[[Path, int, int], Path]:
    """Writes a PNG of 16 bits per channel and one value; types: 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA."""

    def write(path: Path, colour_type: int, value: int) -> Path:
        channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
        lines = (b"\0" + struct.pack(">H", value) * channels * WIDTH) * HEIGHT
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks))
        return path

    return write


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One cache for the real data, so that each split is indexed once."""
    return str(tmp_path_factory.mktemp("index"))


@pytest.fixture
def semantic_folder(tmp_path: Path) -> Path:
    """Two training images: left half label 0, right half 1, one void pixel; and all label 2. One val image."""
    root = tmp_path / "semantic"
    halves = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    halves[:, WIDTH // 2 :] = 1
    halves[0, 0] = 255
    maps = {"train": [halves, np.full((HEIGHT, WIDTH), 2, dtype=np.uint8)], "val": [halves]}
    for split, arrays in maps.items():
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for number, labels in enumerate(arrays):
            _grey(40 * number).save(root / split / "images" / f"{number}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{number}.png")
    (root / "id2label.json").write_text(json.dumps({"0": "road", "1": "tree", "2": "sky"}))
    return root


@pytest.fixture
def overlapping_masks() -> np.ndarray:
    """(3, H, W): two rectangles that share four pixels, and a crowd in the corner."""
    masks = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    masks[0, 0:4, 0:4] = True
    masks[1, 2:6, 2:6] = True
    masks[2, 5:, 7:] = True
    return masks


@pytest.fixture
def instance_folder(tmp_path: Path, overlapping_masks: np.ndarray) -> Path:
    """One image with the overlapping masks (categories 7, 3 and 7, the last a crowd), one image without objects."""
    root = tmp_path / "instance"
    (root / "train" / "images").mkdir(parents=True)
    for number in (0, 1):
        _grey(40 * number).save(root / "train" / "images" / f"{number}.png")
    annotations = [
        {
            "id": 10 + index,
            "image_id": 100,
            "category_id": (7, 3, 7)[index],
            "segmentation": encode_rle(mask),
            "area": int(mask.sum()),
            "iscrowd": int(index == 2),
        }
        for index, mask in enumerate(overlapping_masks)
    ]
    content = {
        "images": [
            {"id": 100 + number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (0, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (root / "train" / "instances.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def panoptic_ids() -> np.ndarray:
    """(H, W): thing 1000, thing 70000 (three colour bytes), stuff 5 and 6 of one class, one void pixel."""
    ids = np.full((HEIGHT, WIDTH), 5, dtype=np.int32)
    ids[:, 6:] = 6
    ids[0:2, 0:2] = 1000
    ids[3:5, 3:5] = 70000
    ids[5, 0] = 0
    return ids


@pytest.fixture
def panoptic_folder(tmp_path: Path, panoptic_ids: np.ndarray) -> Path:
    root = tmp_path / "panoptic_set"
    (root / "train" / "images").mkdir(parents=True)
    (root / "train" / "panoptic").mkdir()
    _grey(90).save(root / "train" / "images" / "a.png")
    Image.fromarray(ids_to_panoptic_png(panoptic_ids)).save(root / "train" / "panoptic" / "a.png")
    segments = [(1000, 1), (70000, 1), (5, 2), (6, 2)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "a.png",
                "segments_info": [{"id": i, "category_id": c, "iscrowd": int(i == 70000)} for i, c in segments],
            }
        ],
        "categories": [{"id": 2, "name": "grass", "isthing": 0}, {"id": 1, "name": "cow", "isthing": 1}],
    }
    (root / "train" / "panoptic.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict], object]], None]:
    """Changes a JSON file by a function that works in place."""

    def edit(path: Path, change: Callable[[dict], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def read_rows() -> Callable[..., tuple[list[dict], Problems]]:
    """Reads a split without storing it: its rows, and what the reader reported."""

    def read(
        root: Path, mode: str, split: str | None = "train", format: str | None = None, **options: object
    ) -> tuple[list[dict], Problems]:
        problems = Problems(mode)
        source = open_source(find_layouts(root, split, None, format)[0], root, options, problems)
        return list(source.rows()), problems

    return read


@pytest.fixture
def check_problem(read_rows: Callable) -> Callable[..., list[dict]]:
    """Checks that an error is raised in mode "raise" and listed in mode "list", where the other rows are returned."""

    def check(root: Path, kind: str, file: str, message: str, **options: object) -> list[dict]:
        with pytest.raises(ValueError, match=message):
            read_rows(root, "raise", **options)
        rows, problems = read_rows(root, "list", **options)
        assert [(problem.kind, problem.file) for problem in problems.found] == [(kind, str(root / file))]
        assert re.search(message, problems.found[0].message)
        return rows

    return check


@pytest.fixture
def cityscapes_ids() -> np.ndarray:
    """(H, W) instance ids: road, two cars, a group of persons, static (void) and a caravan (void)."""
    ids = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)
    ids[0:2, 0:2] = 26000
    ids[0:2, 3:5] = 26001
    ids[3:5, 0:4] = 24
    ids[5, 0:3] = 4
    ids[5, 5:8] = 29000
    return ids


@pytest.fixture
def cityscapes_folder(tmp_path: Path, cityscapes_ids: np.ndarray) -> Path:
    """Two training cities with one image each, of which bonn has road only; the same in val; test without labels."""
    root = tmp_path / "cityscapes"
    maps = {"aachen": cityscapes_ids, "bonn": np.full_like(cityscapes_ids, 7)}
    for split in ("train", "val", "test"):
        for city, ids in maps.items():
            images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
            images.mkdir(parents=True)
            _grey(60).save(images / f"{city}_000000_000019_leftImg8bit.png")
            if split != "test":
                labels.mkdir(parents=True)
                Image.fromarray(ids).save(labels / f"{city}_000000_000019_gtFine_instanceIds.png")
    return root


@pytest.fixture
def ade20k_folder(tmp_path: Path) -> Path:
    """Images a (void in the first column, wall, and 150 in the last one) and b (wall); the same in validation."""
    root = tmp_path / "ADEChallengeData2016"
    raw = np.ones((HEIGHT, WIDTH), dtype=np.uint8)
    raw[:, 0], raw[:, -1] = 0, 150
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for name, values in (("a", raw), ("b", np.ones_like(raw))):
            _grey(60).save(root / "images" / split / f"{name}.jpg")
            Image.fromarray(values).save(root / "annotations" / split / f"{name}.png")
    names = ["wall", "building, edifice", "screen, silver screen", "screen, CRT screen"]
    names += [f"class {number}, other name" for number in range(5, 151)]
    lines = [f"{number}\t0.1\t10\t1\t0\t{name}" for number, name in enumerate(names, start=1)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture
def yolo_folder(tmp_path: Path) -> Path:
    """Image a with two rectangles that overlap, of classes 1 and 0; b with an empty file, c without one; and val."""
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for name in "abc":
            _grey(60).save(root / "images" / split / f"{name}.png")
        # Columns 0..3 of rows 0..2, and columns 2..5 of rows 1..4: 8 columns and 6 rows.
        lines = ["1 0 0 0.5 0 0.5 0.5 0 0.5", "", "0 0.25 0.166667 0.75 0.166667 0.75 0.833333 0.25 0.833333"]
        (root / "labels" / split / "a.txt").write_text("\n".join(lines) + "\n")
        (root / "labels" / split / "b.txt").write_text("")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
    return root


@pytest.fixture
def object_folder(tmp_path: Path, overlapping_masks: np.ndarray) -> Path:
    """The shape of the 2018 Data Science Bowl: image a with two masks that overlap, image b with one."""
    root = tmp_path / "bowl"
    for name, masks in (("a", overlapping_masks[:2]), ("b", overlapping_masks[2:])):
        for part in ("images", "masks"):
            (root / "train" / name / part).mkdir(parents=True)
        _grey(60).save(root / "train" / name / "images" / f"{name}.png")
        for number, mask in enumerate(masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "train" / name / "masks" / f"m{number}.png")
    return root


@pytest.fixture
def id_map() -> np.ndarray:
    """(H, W) uint8: object 3 in two pieces, object 7 that touches one of them."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[0:2, 0:3] = 3
    ids[5, 7] = 3
    ids[2:5, 1:4] = 7
    return ids


@pytest.fixture
def id_map_folder(tmp_path: Path, id_map: np.ndarray) -> Path:
    """Training image a with the two objects of `id_map`, b with object 255; validation image c as a."""
    root = tmp_path / "cells"
    one = np.zeros_like(id_map)
    one[1:3, 2:6] = 255
    maps = {("train", "a"): id_map, ("train", "b"): one, ("val", "c"): id_map}
    for number, ((split, name), ids) in enumerate(maps.items()):
        for part in ("images", "instance_maps"):
            (root / split / part).mkdir(parents=True, exist_ok=True)
        _grey(40 * number).save(root / split / "images" / f"{name}.png")
        Image.fromarray(ids).save(root / split / "instance_maps" / f"{name}.png")
    return root


@pytest.fixture
def load_set(tmp_path: Path) -> Callable[..., SegmentationData]:
    """Saves a data set with `save_to_disk` and loads it."""

    def load(data: Dataset, task: str | None = None, **options: Any) -> SegmentationData:
        folder = tmp_path / "saved" / str(len(list(tmp_path.glob("saved/*"))))
        data.save_to_disk(str(folder))
        return load_hub(folder, None, task, {"cache_dir": str(tmp_path / "cache"), **options})

    return load
