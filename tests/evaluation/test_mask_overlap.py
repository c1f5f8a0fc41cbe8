"""Overlaps of cropped masks against whole arrays."""

import numpy as np

from hf_maskformer.evaluation.mask_overlap import crop_mask, pairwise_intersections, pairwise_ious


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
