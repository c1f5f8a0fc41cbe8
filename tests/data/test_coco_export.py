"""COCO -> schema -> COCO: nothing is lost but the form of the polygons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from hf_maskformer.data.coco_export import to_coco_instance, to_coco_panoptic
from hf_maskformer.data.load import load

IMAGE_KEYS = ("id", "file_name", "height", "width")
ANNOTATION_KEYS = ("id", "image_id", "category_id", "iscrowd", "area", "bbox")


def code_of(segmentation: Any, height: int, width: int) -> str:
    """What pycocotools makes of any form."""
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, height, width))["counts"].decode()
    if isinstance(segmentation["counts"], list):
        return coco.frPyObjects(segmentation, height, width)["counts"].decode()
    return segmentation["counts"]


def assert_equal_up_to_rle(written: dict, original: dict) -> None:
    assert written["images"] == [{key: image[key] for key in IMAGE_KEYS} for image in original["images"]]
    names = [(category["id"], category["name"]) for category in original["categories"]]
    assert [(category["id"], category["name"]) for category in written["categories"]] == sorted(names)
    sizes = {image["id"]: [image["height"], image["width"]] for image in original["images"]}
    by_id = {annotation["id"]: annotation for annotation in written["annotations"]}
    assert len(written["annotations"]) == len(by_id) == len(original["annotations"])
    for annotation in original["annotations"]:
        copy, size = by_id[annotation["id"]], sizes[annotation["image_id"]]
        assert {key: copy[key] for key in ANNOTATION_KEYS} == {key: annotation[key] for key in ANNOTATION_KEYS}
        assert copy["segmentation"] == {"size": size, "counts": code_of(annotation["segmentation"], *size)}


def write_instances(folder: Path, content: dict) -> Path:
    for image in content["images"]:
        (folder / "train" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(folder / "train" / "images" / image["file_name"])
    (folder / "train" / "instances.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def mixed_content() -> dict:
    """Polygons of one and two parts, both forms of codes, a crowd and objects that overlap, in two images."""
    rng = np.random.default_rng(3)
    block = np.zeros((30, 40), dtype=np.uint8)
    block[5:20, 8:30] = 1
    code = coco.encode(np.asfortranarray(block))["counts"].decode()
    forms: list[Any] = [
        [rng.uniform(0, 30, 24).round(2).tolist()],
        [rng.uniform(0, 30, 10).round(2).tolist(), rng.uniform(10, 30, 12).round(2).tolist()],
        {"size": [30, 40], "counts": code},
        {"size": [30, 40], "counts": [100, 30, 500, 570]},
        {"size": [30, 40], "counts": code},
    ]
    annotations = []
    for index, form in enumerate(forms):
        box = coco.toBbox({"size": [30, 40], "counts": code_of(form, 30, 40)})
        annotations.append(
            {
                "id": 1000 - index,
                "image_id": 7 if index < 4 else 3,
                "category_id": (90, 1, 90, 17, 1)[index],
                "segmentation": form,
                "area": 100.25 + index,
                "bbox": np.add(box, [0.25, 0.5, -0.13, 0.27]).round(2).tolist(),
                "iscrowd": int(index == 3),
            }
        )
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]
    images = [{"id": number, "file_name": f"{number}.png", "height": 30, "width": 40} for number in (7, 3, 5)]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_instances_survive_a_round_trip(tmp_path: Path, cache_dir: str, mixed_content: dict) -> None:
    folder = write_instances(tmp_path / "a", mixed_content)
    data = load(folder, cache_dir=cache_dir)
    written = to_coco_instance(data)
    assert_equal_up_to_rle(written, mixed_content)
    again = to_coco_instance(load(write_instances(tmp_path / "b", written), cache_dir=cache_dir))
    assert again == written
    assert to_coco_instance(load(folder, task="semantic", cache_dir=cache_dir)) == written


def test_overlap_survives(instance_folder: Path, cache_dir: str, overlapping_masks: np.ndarray) -> None:
    written = to_coco_instance(load(instance_folder, cache_dir=cache_dir))
    masks = [coco.decode(annotation["segmentation"]) for annotation in written["annotations"]]
    np.testing.assert_array_equal(masks, overlapping_masks)
    assert [annotation["iscrowd"] for annotation in written["annotations"]] == [0, 0, 1]


def test_real_instances_survive(shared_data: Path, shared_cache: str) -> None:
    data = load(shared_data / "nuclei", split="val", task="instance", cache_dir=shared_cache)
    original = json.loads((shared_data / "nuclei" / "val" / "instances.json").read_text())
    assert_equal_up_to_rle(to_coco_instance(data), original)


def test_real_detection_annotations_survive(shared_data: Path, tmp_path: Path, cache_dir: str) -> None:
    source = shared_data / "coco_panoptic_sample"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(source / "input_images")
    content = (source / "panoptic_coco_detection_format.json").read_text()
    (tmp_path / "train" / "instances.json").write_text(content)
    written = to_coco_instance(load(tmp_path, cache_dir=cache_dir))
    assert_equal_up_to_rle(written, json.loads(content))


def test_ids_that_are_not_unique_are_numbered(semantic_folder: Path, cache_dir: str) -> None:
    written = to_coco_instance(load(semantic_folder, cache_dir=cache_dir))
    assert [annotation["id"] for annotation in written["annotations"]] == [1, 2, 3]
    assert [annotation["image_id"] for annotation in written["annotations"]] == [0, 0, 1]
    assert [annotation["category_id"] for annotation in written["annotations"]] == [0, 1, 2]
    assert written["categories"][2] == {"id": 2, "name": "sky", "isthing": 0}


def compare_panoptic(written: dict, folder: Path, original: dict, maps: Path) -> None:
    assert written["images"] == [{key: image[key] for key in IMAGE_KEYS} for image in original["images"]]
    by_image = {annotation["image_id"]: annotation for annotation in written["annotations"]}
    for annotation in original["annotations"]:
        copy = by_image[annotation["image_id"]]
        keys = ("id", "category_id", "iscrowd", "area", "bbox")
        infos = [{key: info[key] for key in keys} for info in annotation["segments_info"]]
        assert copy["segments_info"] == infos
        pixels, expected = (
            np.asarray(Image.open(path)) for path in (folder / copy["file_name"], maps / annotation["file_name"])
        )
        np.testing.assert_array_equal(pixels, expected)


def test_real_panoptic_files_survive(shared_data: Path, shared_cache: str, tmp_path: Path) -> None:
    root = shared_data / "coco_panoptic_sample"
    data = load(root, split=None, cache_dir=shared_cache)
    original = json.loads((root / "panoptic_examples.json").read_text())
    compare_panoptic(to_coco_panoptic(data, tmp_path), tmp_path, original, root / "panoptic_examples")


def test_panoptic_files_survive(panoptic_folder: Path, cache_dir: str, tmp_path: Path) -> None:
    data = load(panoptic_folder, cache_dir=cache_dir)
    written = to_coco_panoptic(data, tmp_path / "out")
    original = np.asarray(Image.open(panoptic_folder / "train" / "panoptic" / "a.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), original)
    info = written["annotations"][0]["segments_info"]
    assert [(s["id"], s["category_id"], s["iscrowd"], s["area"]) for s in info] == [
        (1000, 1, 0, 4),
        (70000, 1, 1, 4),
        (5, 2, 0, 27),
        (6, 2, 0, 12),
    ]
    assert info[0]["bbox"] == [0, 0, 2, 2]
    assert written["categories"] == [{"id": 1, "name": "cow", "isthing": 1}, {"id": 2, "name": "grass", "isthing": 0}]


def test_segments_that_share_pixels_are_refused(instance_folder: Path, cache_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.png: segments 10 and 11 share pixels.*to_coco_instance"):
        to_coco_panoptic(load(instance_folder, cache_dir=cache_dir), tmp_path / "out")


def test_other_data_become_panoptic(
    instance_folder: Path, cache_dir: str, tmp_path: Path, edit_json: Callable, overlapping_masks: np.ndarray
) -> None:
    def change(content: dict) -> None:
        del content["annotations"][1]
        content["annotations"][0]["id"] = 256**3  # does not fit into a PNG

    edit_json(instance_folder / "train" / "instances.json", change)
    written = to_coco_panoptic(load(instance_folder, cache_dir=cache_dir), tmp_path / "out")
    ids = np.asarray(Image.open(tmp_path / "out" / "0.png"))[..., 0]
    np.testing.assert_array_equal(ids, overlapping_masks[0] + 2 * overlapping_masks[2])
    assert [info["id"] for info in written["annotations"][0]["segments_info"]] == [1, 2]
    assert written["annotations"][1]["segments_info"] == []
    assert not np.asarray(Image.open(tmp_path / "out" / "1.png")).any()
