"""Files that are no readable image: raised while indexing, or with on_bad_sample="skip" logged and left out."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from hf_maskformer.data.dataset_index import readable_rows
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import FEATURES
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.label_spec import LabelSpec

DAMAGE = {"empty": b"", "text": b"not an image"}


@pytest.fixture
def two_panoptic_images(panoptic_folder: Path) -> Path:
    """The panoptic folder with its image, map and records a second time."""
    split = panoptic_folder / "train"
    content = json.loads((split / "panoptic.json").read_text())
    for part in ("images", "panoptic"):
        shutil.copy(split / part / "a.png", split / part / "b.png")
    content["images"].append({**content["images"][0], "id": 2, "file_name": "b.png"})
    content["annotations"].append({**content["annotations"][0], "image_id": 2, "file_name": "b.png"})
    (split / "panoptic.json").write_text(json.dumps(content))
    return panoptic_folder


@pytest.mark.parametrize("damage", list(DAMAGE))
@pytest.mark.parametrize(
    ("folder", "bad", "kept"),
    [
        ("semantic_folder", "images/0.png", "1"),
        ("semantic_folder", "labels/0.png", "1"),
        ("instance_folder", "images/0.png", "101"),
        ("two_panoptic_images", "images/a.png", "2"),
        ("two_panoptic_images", "panoptic/a.png", "2"),
    ],
)
def test_an_unreadable_file_is_raised_or_left_out(
    folder: str,
    bad: str,
    kept: str,
    damage: str,
    cache_dir: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = request.getfixturevalue(folder)
    (root / "train" / bad).write_bytes(DAMAGE[damage])
    with caplog.at_level(logging.WARNING):
        data = load(root, cache_dir=cache_dir, on_bad_sample="skip")
    assert [data.row(index)["image_id"] for index in range(len(data))] == [kept]
    assert data.sample(0).image.shape == (6, 8, 3)
    assert f"{bad}: cannot be read as an image" in caplog.text
    assert "1 of 2 images are left out" in caplog.text
    with pytest.raises(ValueError, match=rf"{bad}: cannot be read as an image"):  # not the rows kept by "skip"
        load(root, cache_dir=cache_dir)


@pytest.mark.parametrize("folder", ["semantic_folder", "instance_folder", "panoptic_folder"])
def test_nothing_but_unreadable_files_is_an_error(folder: str, cache_dir: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(folder)
    for file in (root / "train" / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.*: none of the \d images can be read, such as .*\.png"):
        load(root, cache_dir=cache_dir, on_bad_sample="skip")


def test_labels_are_inferred_from_what_can_be_read(semantic_folder: Path, cache_dir: str) -> None:
    (semantic_folder / "id2label.json").unlink()
    shutil.copy(semantic_folder / "val" / "labels" / "0.png", semantic_folder / "val" / "labels" / "1.png")
    (semantic_folder / "val" / "images" / "1.png").write_bytes(b"")
    data = load(semantic_folder, cache_dir=cache_dir, on_bad_sample="skip")
    assert (len(data), data.label_spec.num_labels) == (2, 3)


def test_colours_of_16_bits_are_found_while_indexing(
    semantic_folder: Path, cache_dir: str, deep_png: Callable[[Path, int, int], Path]
) -> None:
    deep_png(semantic_folder / "train" / "images" / "0.png", 2, 2047)
    with pytest.raises(ValueError, match=r"0\.png: has 16 bits per channel"):
        load(semantic_folder, cache_dir=cache_dir)
    assert len(load(semantic_folder, cache_dir=cache_dir, on_bad_sample="skip")) == 1


def test_label_maps_of_several_pages_are_refused(semantic_folder: Path, cache_dir: str) -> None:
    """Only the first page would be read."""
    pages = [Image.new("L", (8, 6), value) for value in (0, 1)]
    (semantic_folder / "train" / "labels" / "0.png").unlink()
    pages[0].save(semantic_folder / "train" / "labels" / "0.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"labels/0\.tif: TIFF file of 2 pages; an image has one"):
        load(semantic_folder, cache_dir=cache_dir)
    assert len(load(semantic_folder, cache_dir=cache_dir, on_bad_sample="skip")) == 1


def test_what_is_wrong_with_the_dataset_is_raised_in_any_case(
    instance_folder: Path, cache_dir: str, edit_json: Callable
) -> None:
    edit_json(instance_folder / "train" / "instances.json", lambda content: content["images"][0].update(width=9))
    with pytest.raises(ValueError, match=r"0\.png is 8x6"):
        load(instance_folder, cache_dir=cache_dir, on_bad_sample="skip")


def test_scenes_take_the_option_and_others_are_refused() -> None:
    assert len(load("scenes", length=2, on_bad_sample="skip")) == 2
    with pytest.raises(ValueError, match="on_bad_sample 'ignore' is not allowed: raise, skip"):
        load("scenes", on_bad_sample="ignore")


def test_no_sources_are_no_error(tmp_path: Path) -> None:
    assert list(readable_rows([], dict, "skip", tmp_path)) == []


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_bytes_of_a_row_are_named(content: bytes) -> None:
    row = {"image": {"bytes": content, "path": None}, "image_id": "x", "height": 6, "width": 8}
    rows = Dataset.from_list([{**row, "file_name": "x.png", "segments": []}], features=FEATURES)
    data = SegmentationData(rows, LabelSpec({0: "road"}), "semantic", "semantic_maps")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image"):
        data.sample(0)
