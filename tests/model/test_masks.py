"""Mask codings against pycocotools, on random and on edge cases."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from hf_maskformer.model.masks import (
    decode_rle,
    decode_rles,
    encode_rle,
    encode_rles,
    id_map_to_rles,
    id_map_to_runs,
    ids_to_panoptic_png,
    panoptic_png_to_ids,
    polygons_to_mask,
    polygons_to_rle,
    polygons_to_runs,
    rle_area,
    rle_bbox,
    rle_runs,
    rles_to_runs,
    runs_to_rle,
    segmentation_to_mask,
    segmentation_to_rle,
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
        ({"size": [3], "counts": [6]}, r"size must be \[height, width\]"),
        ({"size": None, "counts": [6]}, r"size must be \[height, width\]"),
        ({"size": [3, 2], "counts": [None]}, "whole numbers"),
        ({"size": [3, 2], "counts": [2**70]}, "whole numbers"),
    ],
)
def test_broken_rle_is_refused(rle, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


@pytest.mark.parametrize("name", ALL_MASKS)
def test_runs_are_those_of_the_mask(name):
    mask = ALL_MASKS[name]
    starts, lengths = rle_runs(coco_rle(mask))
    pixels = np.zeros(mask.size, dtype=int)
    for start, length in zip(starts, lengths, strict=True):
        pixels[start : start + length] += 1
    np.testing.assert_array_equal(pixels.reshape(mask.shape[::-1]).T, mask)
    assert (starts[1:] > starts[:-1] + lengths[:-1]).all(), "runs do not touch"
    assert runs_to_rle(starts, lengths, mask.shape) == coco_rle(mask)


def test_empty_runs_of_a_code_are_taken_out():
    starts, lengths = rle_runs({"size": [3, 2], "counts": [0, 1, 0, 2, 1, 0, 2]})
    assert (starts.tolist(), lengths.tolist()) == ([0], [3])


def test_many_codes_in_one_pass_equal_one_by_one():
    rng = np.random.default_rng(5)
    masks = [rng.random((40, 30)) < density for density in (0.0, 0.02, 0.5, 0.97, 1.0, 0.3)]
    rles = [coco_rle(mask) for mask in masks]
    runs = rles_to_runs(rles, (40, 30))
    assert runs.rles() == rles
    assert runs.areas().tolist() == [int(mask.sum()) for mask in masks]
    for index, rle in enumerate(rles):
        part = slice(runs.offsets[index], runs.offsets[index + 1])
        np.testing.assert_array_equal(runs.starts[part], rle_runs(rle)[0])
    strange = [*rles, {"size": [40, 30], "counts": [0, 5, 0, 5, 1190]}]
    assert rles_to_runs(strange, (40, 30)).areas().tolist()[-1] == 10
    for broken in ("", "~~~", "0", "P", rles[2]["counts"][:-1]):
        with pytest.raises(ValueError, match=r"COCO string|cover"):
            rles_to_runs([rles[0], {"size": [40, 30], "counts": broken}, rles[1]], (40, 30))


def test_an_id_map_is_encoded_in_one_pass():
    ids = np.random.default_rng(1).integers(0, 5, (13, 17)).repeat(3, axis=0) * 1000
    wanted = [3000, 77, 0, 4000]
    expected = [coco_rle(ids == value) for value in wanted]
    assert id_map_to_rles(ids, wanted) == expected
    assert id_map_to_rles(np.asfortranarray(ids).astype(np.int32), wanted) == expected
    assert id_map_to_runs(ids, wanted).areas().tolist() == [int((ids == value).sum()) for value in wanted]
    assert id_map_to_rles(ids, []) == []
    with pytest.raises(ValueError, match="must differ"):
        id_map_to_rles(ids, [0, 0])
    with pytest.raises(ValueError, match="integers of shape"):
        id_map_to_rles(ids / 2, [0])


def test_every_form_of_a_segmentation_becomes_one_code():
    mask = np.array([[0, 1], [1, 1], [0, 0]], dtype=bool)
    code = coco_rle(mask)
    for form in (
        code,
        {"size": [3, 2], "counts": code["counts"].encode()},
        {"size": [3, 2], "counts": [1, 1, 1, 2, 1]},
    ):
        assert segmentation_to_rle(form, 3, 2) == code


def test_codes_of_real_annotations_are_written_and_drawn_like_those_of_pycocotools(shared_data):
    folder = shared_data / "coco_panoptic_sample"
    annotations = json.loads((folder / "panoptic_coco_detection_format.json").read_text())["annotations"]
    for annotation in annotations:
        rle = annotation["segmentation"]
        mask = decode_rle(rle)
        np.testing.assert_array_equal(mask, coco.decode(rle))
        assert encode_rle(mask)["counts"] == rle["counts"]
    images = {annotation["image_id"] for annotation in annotations}
    for image_id in images:
        rles = [annotation["segmentation"] for annotation in annotations if annotation["image_id"] == image_id]
        assert rles_to_runs(rles, tuple(rles[0]["size"])).rles() == [{**rle, "size": rles[0]["size"]} for rle in rles]


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
    assert polygons_to_rle(polygons, height, width) == merged_by_coco(polygons, height, width)


def merged_by_coco(polygons: list, height: int, width: int) -> dict:
    merged = coco.merge(coco.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def random_polygons(rng: np.random.Generator, height: int, width: int) -> list[list[float]]:
    """Like annotations: small and large, on half pixels or not, some with repeated points, some over the border."""
    polygons = []
    for _ in range(int(rng.integers(1, 4))):
        points = rng.uniform(-0.1, 1.1, 2) + rng.uniform(-0.4, 0.4, (int(rng.integers(3, 40)), 2))
        points = (points * [width, height] * 4).round(int(rng.integers(0, 2))) / 4
        points = np.repeat(points, rng.integers(1, 3, len(points)), axis=0)
        polygons.append(points.reshape(-1).tolist())
    return polygons


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_polygons_in_one_pass_equal_pycocotools(seed):
    rng = np.random.default_rng(100 + seed)
    height, width = (int(value) for value in rng.integers(2, 400, size=2))
    groups = [random_polygons(rng, height, width) for _ in range(25)]
    groups.insert(int(rng.integers(26)), [])  # an annotation without a polygon
    runs = polygons_to_runs(groups, height, width)
    expected = [
        merged_by_coco(group, height, width) if group else coco_rle(np.zeros((height, width))) for group in groups
    ]
    assert runs.rles() == expected
    assert runs.areas().tolist() == [int(coco.area(rle)) for rle in expected]
    assert runs.boxes().tolist() == [list(coco.toBbox(rle)) for rle in expected]


def test_polygons_that_touch_and_overlap_become_one_run():
    squares = [[0, 0, 4, 0, 4, 3, 0, 3], [0, 3, 4, 3, 4, 5, 0, 5], [1, 1, 3, 1, 3, 2, 1, 2]]
    assert polygons_to_rle(squares, 6, 6) == merged_by_coco(squares, 6, 6)
    starts, lengths = rle_runs(polygons_to_rle(squares, 6, 6))
    assert (starts.tolist(), lengths.tolist()) == ([0, 6, 12, 18], [5, 5, 5, 5])


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
    [
        ([0, 0, 4, 4], "at least 3 points"),
        ([0] * 7, "at least 3 points"),
        ([0, 0, 1, 0, float("nan"), 1], "finite"),
        ([0, 0, 1, 0, float("inf"), 1], "finite"),
        ([0, 0, 1, 0, 2.0**21, 1], "within 1048576"),
        ([0, 0, 1, 0, "x", 1], "no number"),
        ([0, 0, 1, 0, {}, 1], "no number"),
        ([[0, 0], [1, 0], [1, 1]], "at least 3 points"),
    ],
)
def test_bad_polygons_are_refused(polygon, message):
    with pytest.raises(ValueError, match=message):
        polygons_to_mask([polygon], 8, 8)


def test_segmentation_of_another_size_or_kind_is_refused():
    with pytest.raises(ValueError, match=r"RLE has size \[2, 2\], the image has size \[3, 2\]"):
        segmentation_to_mask({"size": [2, 2], "counts": [4]}, 3, 2)
    with pytest.raises(ValueError, match="list of polygons or an RLE dict"):
        segmentation_to_mask([0, 0, 4, 4, 0, 4], 8, 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (9, 11), (0, 4)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, np.asfortranarray, lambda a: a[::-1, ::-1], np.int64])
def test_panoptic_colours_in_any_order_of_memory(size, arrange):
    colours = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    colours[:1, :1] = 255
    given = arrange(colours)
    expected = given.astype(np.int64) @ np.array([1, 256, 256**2])
    ids = panoptic_png_to_ids(given)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)
    assert ids.flags.writeable


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
