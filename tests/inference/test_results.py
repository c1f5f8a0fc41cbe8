"""SegmentationResult: what its files hold."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.inference import SegmentationResult
from hf_maskformer.model.masks import decode_rle, encode_rle, panoptic_png_to_ids

IDS = np.array([[1, 1, 1, 0], [1, 1, 2, 2], [3, 3, 2, 2]], dtype=np.int32)


def result(task="panoptic", classes=3, ids=IDS):
    segments = [
        {"id": number, "label_id": label, "label": f"class {label}", "score": 0.5, "rle": encode_rle(ids == number)}
        for number, label in ((1, 0), (2, 2), (3, 2))
    ]
    image = np.zeros((*ids.shape, 3), dtype=np.uint8)
    return SegmentationResult(ids, segments, task, {label: f"class {label}" for label in range(classes)}, image, "one")


def test_semantic_map():
    assert result().semantic_map().tolist() == [[0, 0, 0, -1], [0, 0, 2, 2], [2, 2, 2, 2]]


def test_mask():
    np.testing.assert_array_equal(result().mask(2), IDS == 2)
    with pytest.raises(ValueError, match=r"segment_id must be one of \[1, 2, 3\], got 9"):
        result().mask(9)


def test_overlay_has_the_size_of_the_image():
    assert result().overlay(labels=False).size == (4, 3)
    other = Image.new("RGB", (4, 3), (255, 255, 255))
    assert result().overlay(other, labels=False).getpixel((3, 0)) == (255, 255, 255)  # void shows the image


def test_saved_panoptic_files(tmp_path):
    paths = result().save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["one_overlay.png", "one_panoptic.png", "one_segments.json"]
    with Image.open(paths[1]) as png:
        np.testing.assert_array_equal(panoptic_png_to_ids(np.asarray(png)), IDS)
    content = json.loads(paths[2].read_text())
    assert (content["task"], content["height"], content["width"]) == ("panoptic", 3, 4)
    for segment in content["segments"]:
        np.testing.assert_array_equal(decode_rle(segment["rle"]), segment["id"] == IDS)


def test_panoptic_png_holds_large_ids(tmp_path):
    ids = np.where(IDS == 3, 70000, IDS).astype(np.int32)
    path = result(ids=ids).save(tmp_path, "large")[1]
    with Image.open(path) as png:
        np.testing.assert_array_equal(panoptic_png_to_ids(np.asarray(png)), ids)


@pytest.mark.parametrize(("classes", "void", "mode"), [(255, 255, "L"), (256, 65535, "I;16")])
def test_saved_semantic_labels(tmp_path, classes, void, mode):
    paths = result("semantic", classes).save(tmp_path, stem="other")
    assert [path.name for path in paths] == ["other_overlay.png", "other_labels.png", "other_segments.json"]
    assert json.loads(paths[2].read_text())["name"] == "other"
    with Image.open(paths[1]) as png:
        assert png.mode == mode
        assert np.asarray(png).tolist() == [[0, 0, 0, void], [0, 0, 2, 2], [2, 2, 2, 2]]


def test_other_pycocotools_reads_the_rle(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    content = json.loads(result().save(tmp_path)[2].read_text())
    for segment in content["segments"]:
        np.testing.assert_array_equal(coco_mask.decode(segment["rle"]), segment["id"] == IDS)
