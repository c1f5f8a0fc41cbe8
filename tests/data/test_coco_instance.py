"""COCO instance files: overlap, crowds and ids survive."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hf_maskformer.data.load import load
from hf_maskformer.model.masks import decode_rle, encode_rle


def annotations_file(root: Path) -> Path:
    return root / "train" / "instances.json"


def test_overlap_crowd_area_and_labels_survive(
    instance_folder: Path, cache_dir: str, overlapping_masks: np.ndarray
) -> None:
    data = load(instance_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("coco_instance", "instance", 2)
    assert data.label_spec.id2label == {0: "cat", 1: "dog"}, "in the order of the category ids"
    assert data.label_spec.raw_to_label == {3: 0, 7: 1}
    assert data.label_spec.thing_label_ids == (0, 1)
    reference = data.reference(0)
    np.testing.assert_array_equal([decode_rle(rle) for rle in reference["masks"]], overlapping_masks)
    assert reference["labels"].tolist() == [1, 0, 1]
    assert reference["iscrowd"].tolist() == [False, False, True]
    assert reference["area"].tolist() == [16, 16, 1]
    assert [segment["id"] for segment in data.row(0)["segments"]] == [10, 11, 12]
    sample = data.sample(0)
    np.testing.assert_array_equal(sample.masks, overlapping_masks[:2])
    assert sample.class_labels.tolist() == [1, 0]


def test_image_without_annotations_is_an_empty_row(instance_folder: Path, cache_dir: str) -> None:
    data = load(instance_folder, cache_dir=cache_dir)
    assert data.row(1)["segments"] == []
    assert data.sample(1).masks.shape == (0, 6, 8)
    assert data.reference(1)["masks"] == []


def test_semantic_reference_lets_the_smaller_win(
    instance_folder: Path, cache_dir: str, overlapping_masks: np.ndarray, edit_json: Callable
) -> None:
    """By their pixels: COCO's areas are often 0, or wrong."""
    smaller = overlapping_masks[0] & (np.arange(6) > 0)[:, None]

    def change(content: dict) -> None:
        content["annotations"][0].update(segmentation=encode_rle(smaller), area=99)
        content["annotations"][1].update(area=0)

    edit_json(annotations_file(instance_folder), change)
    data = load(instance_folder, task="semantic", cache_dir=cache_dir)
    expected = np.full((6, 8), 2)  # the background
    expected[overlapping_masks[1]], expected[smaller], expected[overlapping_masks[2]] = 0, 1, 1
    np.testing.assert_array_equal(data.reference(0), expected)


def test_polygons_and_uncompressed_codes_equal_pycocotools(
    instance_folder: Path, cache_dir: str, edit_json: Callable
) -> None:
    polygons = [[1.2, 0.7, 6.6, 1.1, 4.3, 5.2], [0.0, 3.0, 2.0, 3.0, 2.0, 6.0, 0.0, 6.0]]
    counts = [10, 5, 33]

    def change(content: dict) -> None:
        content["annotations"][0]["segmentation"] = polygons
        content["annotations"][1]["segmentation"] = {"size": [6, 8], "counts": counts}

    edit_json(annotations_file(instance_folder), change)
    masks = load(instance_folder, cache_dir=cache_dir).sample(0).masks
    np.testing.assert_array_equal(masks[0], coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 6, 8))))
    np.testing.assert_array_equal(
        masks[1], coco_mask.decode(coco_mask.frPyObjects({"size": [6, 8], "counts": counts}, 6, 8))
    )


def test_annotation_without_a_pixel_is_left_out_with_a_warning(
    instance_folder: Path, cache_dir: str, edit_json: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(annotations_file(instance_folder), lambda c: c["annotations"][0].update(segmentation=[]))
    with caplog.at_level(logging.WARNING):
        data = load(instance_folder, cache_dir=cache_dir)
    assert [segment["id"] for segment in data.row(0)["segments"]] == [11, 12]
    assert "annotation 10 of image 100 (0.png) has a mask without a pixel" in caplog.text


def test_files_that_are_not_listed_are_reported(
    instance_folder: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 6)).save(instance_folder / "train" / "images" / "extra.png")
    with caplog.at_level(logging.WARNING):
        assert len(load(instance_folder, cache_dir=cache_dir)) == 2
    assert "extra.png: is not listed in" in caplog.text


def test_nuclei_codes_are_kept_byte_for_byte(shared_data: Path, shared_cache: str) -> None:
    data = load(shared_data / "nuclei", split="val", task="instance", cache_dir=shared_cache)
    content = json.loads((shared_data / "nuclei" / "val" / "instances.json").read_text())
    assert len(data) == 66
    assert sum(len(row["segments"]) for row in data.dataset) == len(content["annotations"])
    image_id = content["images"][3]["id"]
    expected = [a for a in content["annotations"] if a["image_id"] == image_id]
    row = data.row(3)
    assert [segment["rle"] for segment in row["segments"]] == [a["segmentation"]["counts"] for a in expected]
    assert [segment["area"] for segment in row["segments"]] == [a["area"] for a in expected]
    masks = np.stack([coco_mask.decode(a["segmentation"]) for a in expected])
    np.testing.assert_array_equal(data.sample(3).masks, masks)
