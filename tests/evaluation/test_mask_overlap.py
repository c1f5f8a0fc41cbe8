"""Overlaps of cropped masks against whole arrays."""

import numpy as np
import pytest

from hf_maskformer.evaluation.mask_overlap import crop_mask, crop_rles, pairwise_intersections, pairwise_ious
from hf_maskformer.model.masks import encode_rles


def test_crop_keeps_box_and_area():
    mask = np.zeros((5, 6), dtype=bool)
    mask[1, 2] = mask[3, 4] = True
    cropped = crop_mask(mask)
    assert (cropped.top, cropped.left, cropped.area, cropped.image_size) == (1, 2, 2, (5, 6))
    np.testing.assert_array_equal(cropped.pixels, mask[1:4, 2:5])
    assert crop_mask(np.zeros((5, 6), dtype=bool)).area == 0


def test_intersections_equal_whole_arrays():
    rng = np.random.default_rng(0)
    masks = rng.random((12, 20, 30)) < 0.5
    for index, mask in enumerate(masks):  # leave margins of many kinds
        mask[: index % 5 * 3] = False
        mask[:, 30 - index % 4 * 7 :] = False
    first, second = masks[:7], masks[7:]
    expected = (first[:, None] & second[None]).sum(axis=(2, 3))
    cropped = [crop_mask(mask) for mask in masks]
    np.testing.assert_array_equal(pairwise_intersections(cropped[:7], cropped[7:]), expected)


def test_iou_with_a_crowd_is_the_share_of_the_detection():
    detection, reference = np.zeros((2, 4, 4), dtype=bool)
    detection[0] = True
    reference[0, :2] = reference[1:] = True
    masks = [crop_mask(detection)], [crop_mask(reference), crop_mask(reference)]
    np.testing.assert_allclose(pairwise_ious(*masks, np.array([False, True])), [[2 / 16, 2 / 4]])


def test_empty_masks_and_no_masks_overlap_nothing():
    empty = crop_mask(np.zeros((4, 4), dtype=bool))
    full = crop_mask(np.ones((4, 4), dtype=bool))
    assert pairwise_ious([empty], [full, empty], np.array([False, True])).tolist() == [[0.0, 0.0]]
    assert pairwise_ious([], [full], np.array([False])).shape == (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_code_is_cropped_as_the_mask(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(rng.integers(1, 40, size=2), dtype=bool)
    rows, columns = (np.sort(rng.integers(0, side + 1, size=2)) for side in mask.shape)
    inside = mask[rows[0] : rows[1], columns[0] : columns[1]]
    inside[...] = rng.random(inside.shape) < rng.choice([0.1, 0.8, 1.0])
    masks = [mask, ~mask, np.zeros_like(mask), np.ones_like(mask), mask]
    found = crop_rles(encode_rles(np.stack(masks)))
    for one, cropped in zip(masks, found, strict=True):
        assert_same_crop(cropped, crop_mask(one))
    chosen = crop_rles(encode_rles(np.stack(masks)), [3, 0])
    assert_same_crop(chosen[0], found[3])
    assert_same_crop(chosen[1], found[0])


def test_codes_with_empty_runs():
    mask = np.zeros((3, 4), dtype=bool)
    mask[:2, 1] = mask[1, 2] = True
    found = crop_rles([{"size": [3, 4], "counts": [3, 1, 0, 1, 2, 1, 0, 0, 4]}])
    assert_same_crop(found[0], crop_mask(mask))
    assert crop_rles([]) == []


def test_wrong_codes_are_refused():
    with pytest.raises(ValueError, match="cover 5 pixels"):
        crop_rles([{"size": [3, 4], "counts": [5]}])
    with pytest.raises(ValueError, match=r"RLE 1 has size \[4, 3\], expected \[3, 4\]"):
        crop_rles([{"size": [3, 4], "counts": [12]}, {"size": [4, 3], "counts": [12]}])


@pytest.mark.parametrize("width", [16, 13])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.float32])
def test_every_mask_type_and_layout(width, dtype):
    mask = np.zeros((9, width))
    mask[2:5, 3:11] = 1
    mask[4, 5] = 0
    expected = crop_mask(mask.astype(bool))
    assert (expected.top, expected.left, expected.area) == (2, 3, 23)
    typed = (mask * (1 if dtype in (bool, np.float32) else 100)).astype(dtype)
    for layout in (typed, np.asfortranarray(typed), np.repeat(typed, 2, axis=1)[:, ::2]):
        assert_same_crop(crop_mask(layout), expected)


@pytest.mark.parametrize("value", [-8.0, 0.5, np.nan])
def test_masks_that_are_no_masks_are_refused(value):
    with pytest.raises(ValueError, match=f"may only hold 0 and 1, got {value}"):
        crop_mask(np.full((4, 4), value))
    mask = np.eye(4, dtype=np.float32)
    mask[3, 0] = value
    with pytest.raises(ValueError, match=f"may only hold 0 and 1, got {value}"):
        crop_mask(mask)


def test_pairs_that_are_not_wanted_are_apart():
    masks = [crop_mask(np.ones((4, 4), dtype=bool))] * 2
    wanted = np.array([[True, False], [False, True]])
    assert pairwise_intersections(masks, masks, wanted).tolist() == [[16, 0], [0, 16]]
    assert pairwise_ious(masks, masks, np.zeros(2, dtype=bool), wanted).tolist() == [[1, 0], [0, 1]]


def assert_same_crop(found, expected):
    assert found[1:] == expected[1:]
    assert found.pixels.dtype == bool
    np.testing.assert_array_equal(found.pixels, expected.pixels)
