"""Mask codings against pycocotools, on random and on edge cases."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from hf_maskformer.model.masks import (
    decode_rle,
    decode_rles,
    encode_rle,
    encode_rles,
    ids_to_panoptic_png,
    panoptic_png_to_ids,
    polygons_to_mask,
    rle_area,
    rle_bbox,
    segmentation_to_mask,
)


def coco_rle(mask: np.ndarray) -> dict:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(value) for value in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def edge_masks() -> dict[str, np.ndarray]:
    corner = np.zeros((3, 4), dtype=bool)
    corner[0, 0] = True
    last = np.zeros((3, 4), dtype=bool)
    last[-1, -1] = True
    turning = np.zeros((4, 2), dtype=bool)
    turning[2:, 0], turning[:2, 1] = True, True
    return {
        "one run over two columns": turning,
        "empty": np.zeros((3, 4), dtype=bool),
        "full": np.ones((3, 4), dtype=bool),
        "first pixel": corner,
        "last pixel": last,
        "one pixel": np.ones((1, 1), dtype=bool),
        "checkerboard": (np.indices((7, 5)).sum(0) % 2).astype(bool),
        "long runs": np.kron(np.eye(2, dtype=bool), np.ones((400, 300), dtype=bool)),
    }


def random_masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"random {height}x{width} {density}": rng.random((height, width)) < density
        for height, width in ((1, 9), (9, 1), (37, 53), (128, 200))
        for density in (0.02, 0.5, 0.97)
    }


ALL_MASKS = edge_masks() | random_masks()


@pytest.mark.parametrize("name", ALL_MASKS)
def test_rle_is_byte_for_byte_that_of_pycocotools(name):
    mask = ALL_MASKS[name]
    rle = encode_rle(mask)
    assert rle == coco_rle(mask)
    assert encode_rle(torch.from_numpy(mask)) == rle
    assert decode_rle(rle).dtype == bool
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(coco.decode(rle), mask)
    assert rle_area(rle) == int(coco.area(rle))
    assert rle_bbox(rle) == list(coco.toBbox(rle))


def test_rle_is_read_from_str_bytes_and_uncompressed_counts():
    mask = np.array([[0, 1], [1, 1], [0, 0]], dtype=bool)  # columns: 0 1 0 | 1 1 0
    for counts in (encode_rle(mask)["counts"], encode_rle(mask)["counts"].encode(), [1, 1, 1, 2, 1]):
        np.testing.assert_array_equal(decode_rle({"size": [3, 2], "counts": counts}), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [3, 2], "counts": [1, 1]}, "cover 2 pixels"),
        ({"size": [3, 2], "counts": [-1, 7]}, "cover 6 pixels"),
        ({"size": [3, 2], "counts": "a b"}, "not a COCO string"),
        ({"size": [3, 2], "counts": ""}, "not a COCO string"),
        ({"counts": [6]}, "size and counts"),
    ],
)
def test_broken_rle_is_refused(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


def test_lists_of_masks_and_no_mask():
    masks = np.stack([np.eye(4, dtype=bool), np.zeros((4, 4), dtype=bool)])
    np.testing.assert_array_equal(decode_rles(encode_rles(masks), (4, 4)), masks)
    assert encode_rles(np.zeros((0, 5, 7), dtype=bool)) == []
    assert decode_rles([], (5, 7)).shape == (0, 5, 7)
    with pytest.raises(ValueError, match=r"RLE 0 has size \[4, 4\], expected \[5, 4\]"):
        decode_rles(encode_rles(masks), (5, 4))


@pytest.mark.parametrize("seed", range(30))
def test_polygons_have_the_pixels_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(value) for value in rng.integers(1, 90, size=2))
    polygons = []
    for _ in range(int(rng.integers(1, 4))):
        points = rng.uniform(-0.2, 1.2, size=(int(rng.integers(3, 15)), 2)) * [width, height]
        points = np.round(points, int(rng.integers(0, 3)))
        polygons.append(points.reshape(-1).tolist())
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
    np.testing.assert_array_equal(polygons_to_mask(polygons, height, width), expected)


@pytest.mark.parametrize(
    "polygon",
    [
        [0, 0, 10, 0, 10, 8, 0, 8],  # the whole image
        [2, 2, 2, 2, 5, 2, 5, 5, 2, 5],  # a repeated point
        [1.5, 1.5, 1.5, 6.5, 1.5, 3.0],  # no area
        [-30, -30, 40, -30, 40, 40, -30, 40],  # far outside
        [3, 7, 9.99, 7.99, 3.01, 0.5, 3, 7],  # closed twice
    ],
)
def test_special_polygons_have_the_pixels_of_pycocotools(polygon):
    expected = coco.decode(coco.merge(coco.frPyObjects([polygon], 8, 10)))
    np.testing.assert_array_equal(segmentation_to_mask([polygon], 8, 10), expected)


@pytest.mark.parametrize(
    ("polygon", "message"),
    [([0, 0, 4, 4], "at least 3 points"), ([0] * 7, "at least 3 points"), ([0, 0, 1, 0, float("nan"), 1], "finite")],
)
def test_bad_polygons_are_refused(polygon, message):
    with pytest.raises(ValueError, match=message):
        polygons_to_mask([polygon], 8, 8)


def test_segmentation_of_another_size_or_kind_is_refused():
    with pytest.raises(ValueError, match=r"RLE has size \[2, 2\], the image has size \[3, 2\]"):
        segmentation_to_mask({"size": [2, 2], "counts": [4]}, 3, 2)
    with pytest.raises(ValueError, match="list of polygons or an RLE dict"):
        segmentation_to_mask([0, 0, 4, 4, 0, 4], 8, 8)


def test_panoptic_png_round_trip():
    ids = np.array([[0, 1, 255], [256, 65536, 256**3 - 1]])
    png = ids_to_panoptic_png(ids)
    assert png.dtype == np.uint8
    assert png[1, 0].tolist() == [0, 1, 0]
    assert panoptic_png_to_ids(png).dtype == np.int32
    np.testing.assert_array_equal(panoptic_png_to_ids(png), ids)
    with pytest.raises(ValueError, match=r"0\.\.16777215"):
        ids_to_panoptic_png(np.array([[256**3]]))
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        panoptic_png_to_ids(np.zeros((4, 4), dtype=np.uint8))
