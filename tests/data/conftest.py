"""Small datasets written by hand, in each of the folder shapes."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    """(H, W): thing 1000, thing 70000 (three colour bytes), stuff 5 and 6 of one class, id 9 that nobody names."""
    ids = np.full((HEIGHT, WIDTH), 5, dtype=np.int32)
    ids[:, 6:] = 6
    ids[0:2, 0:2] = 1000
    ids[3:5, 3:5] = 70000
    ids[5, 0] = 9
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
