"""Boundaries: exact values on small masks, the definition taken literally on random ones, and BoundaryIoU by hand."""

import math

import numpy as np
import pytest
import torch

from hf_maskformer.evaluation import BoundaryIoU
from hf_maskformer.evaluation.boundary import (
    boundary_iou,
    boundary_width,
    id_map_boundary,
    mask_boundary,
    segment_boundary_iou,
)

RING = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]


def literal_boundary(mask, width):
    """Pixels of the mask with a pixel outside it, or outside the image, at a chessboard distance of at most width."""
    height, breadth = mask.shape
    result = np.zeros_like(mask)
    for row, column in np.argwhere(mask):
        rows, columns = range(row - width, row + width + 1), range(column - width, column + width + 1)
        inside = rows[0] >= 0 and columns[0] >= 0 and rows[-1] < height and columns[-1] < breadth
        result[row, column] = not (inside and mask[np.ix_(rows, columns)].all())
    return result


@pytest.mark.parametrize(
    ("size", "ratio", "width"),
    [
        ((480, 640), 0.02, 16),  # diagonal 800
        ((1024, 1024), 0.02, 29),  # 28.96
        ((3, 4), 0.02, 1),  # 0.1: at least 1
        ((30, 40), 0.05, 2),  # 2.5: halves go to the even number
        ((42, 56), 0.05, 4),  # 3.5
    ],
)
def test_boundary_width(size, ratio, width):
    assert boundary_width(size, ratio) == width


def test_boundary_of_a_box_is_its_rim():
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    expected = np.zeros((9, 9), dtype=bool)
    expected[2:7, 2:7] = np.array(RING, dtype=bool)
    np.testing.assert_array_equal(mask_boundary(mask, 1), expected)
    expected[2:7, 2:7] = True
    expected[4, 4] = False
    np.testing.assert_array_equal(mask_boundary(mask, 2), expected)
    np.testing.assert_array_equal(mask_boundary(mask, 3), mask)  # too small to have an interior


def test_the_border_of_the_image_is_outside():
    np.testing.assert_array_equal(mask_boundary(np.ones((5, 5), dtype=bool), 1), np.array(RING, dtype=bool))


def test_a_hole_has_a_boundary():
    mask = np.ones((7, 7), dtype=bool)
    mask[3, 3] = False
    expected = mask.copy()
    expected[1, 1:6] = expected[5, 1:6] = expected[1:6, 1] = expected[1:6, 5] = False
    np.testing.assert_array_equal(mask_boundary(mask, 1), expected)


def test_empty_mask_has_no_boundary():
    assert not mask_boundary(np.zeros((4, 6), dtype=bool), 2).any()
    assert mask_boundary(np.zeros((0, 6), dtype=bool), 2).shape == (0, 6)


def test_boundary_equals_the_definition_on_random_masks():
    rng = np.random.RandomState(0)
    for _ in range(100):
        mask = rng.random_sample(rng.randint(1, 16, 2)) < rng.choice([0.5, 0.9, 0.98, 1.0])
        width = rng.randint(1, 4)
        np.testing.assert_array_equal(mask_boundary(mask, width), literal_boundary(mask, width))


def test_boundary_of_a_cut_out_mask_is_the_cut_out_boundary():
    mask = np.zeros((20, 20), dtype=bool)
    mask[3:15, 5:19] = True
    mask[8, 5:9] = False
    np.testing.assert_array_equal(mask_boundary(mask[3:15, 5:19], 2), mask_boundary(mask, 2)[3:15, 5:19])


def test_boundary_of_an_id_map_is_that_of_each_segment():
    rng = np.random.RandomState(1)
    for _ in range(60):
        ids = np.kron(rng.randint(0, 4, (3, 3)), np.ones(rng.randint(1, 7, 2), dtype=np.int64))
        ids[rng.random_sample(ids.shape) < 0.01] = 9
        width = rng.randint(1, 4)
        union = np.any([literal_boundary(ids == number, width) for number in np.unique(ids)], axis=0)
        np.testing.assert_array_equal(id_map_boundary(ids, width), union)


def test_pairwise_boundary_iou_by_hand():
    mask, other = np.zeros((2, 9, 9), dtype=bool)
    mask[2:7, 2:7] = True  # rim of 16 pixels
    other[2:7, 2:8] = True  # rim of 18; common: the left column of 5, 4 more above and below
    assert boundary_iou(mask, other) == 13 / (16 + 18 - 13)
    assert boundary_iou(torch.tensor(mask), torch.tensor(mask)) == 1.0
    assert boundary_iou(mask, np.zeros((9, 9))) == 0.0
    assert math.isnan(boundary_iou(np.zeros((9, 9)), np.zeros((9, 9))))


def test_pairwise_boundary_iou_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4\) but other \(4, 5\)"):
        boundary_iou(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"other must have shape \(H, W\), got \(1, 4, 4\)"):
        boundary_iou(np.zeros((4, 4)), np.zeros((1, 4, 4)))


@pytest.mark.parametrize("value", [-8.0, 0.5, math.nan])
def test_pairwise_boundary_iou_refuses_probabilities(value):
    with pytest.raises(ValueError, match=f"other: a floating-point mask may only hold 0 and 1, got {value}"):
        boundary_iou(np.zeros((4, 4)), np.full((4, 4), value))


def test_segment_boundary_iou_equals_the_pairs_and_leaves_void_out():
    rng = np.random.RandomState(2)
    actual = np.kron(rng.randint(0, 4, (4, 4)), np.ones((6, 6), dtype=np.int64))
    predicted = np.roll(np.kron(rng.randint(0, 3, (4, 4)), np.ones((6, 6), dtype=np.int64)), 2, axis=1)
    table = segment_boundary_iou(actual, predicted, 3, 2, width=2)
    assert table.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            one = mask_boundary(actual == row + 1, 2)
            other = mask_boundary(predicted == column + 1, 2) & (actual > 0)
            assert table[row, column] == (one & other).sum() / (one | other).sum()


# --- BoundaryIoU -----------------------------------------------------------------------------------------------------


def test_semantic_boundaries_by_hand():
    reference = np.zeros((6, 6), dtype=np.int64)
    reference[:, 3:] = 1  # two halves of 6 x 3: each has an interior of 4 x 1, a boundary of 14
    prediction = np.zeros((6, 6), dtype=np.int64)
    prediction[:, 4:] = 1  # 6 x 4: interior 4 x 2, boundary 16; 6 x 2: all 12 are boundary
    result = BoundaryIoU(3).update([prediction], [reference]).compute()
    # class 0: the interior is column 1 in the reference, columns 1 and 2 in the prediction, without the ends
    both = 6 + 2 + 2  # column 0, the ends of columns 1 and 2
    assert result["per_category_boundary_iou"][0] == both / (14 + 16 - both)
    both = 6 + 2  # class 1: column 5, the ends of column 4, whose middle is the reference's interior
    assert result["per_category_boundary_iou"][1] == both / (14 + 12 - both)
    assert math.isnan(result["per_category_boundary_iou"][2])
    assert result["boundary_iou"] == pytest.approx((10 / 20 + 8 / 18) / 2, abs=1e-15)


def test_counts_are_added_over_images_before_dividing():
    small = np.zeros((4, 4), dtype=np.int64)
    wrong = np.ones((4, 4), dtype=np.int64)
    large = np.zeros((6, 6), dtype=np.int64)
    result = BoundaryIoU(2).update([wrong, large], [small, large]).compute()
    assert result["per_category_boundary_iou"] == [20 / (20 + 12), 0.0]  # rims of 12 and 20 pixels


def test_interior_errors_do_not_count():
    reference = np.zeros((9, 9), dtype=np.int64)
    prediction = reference.copy()
    prediction[4, 4] = 1
    result = BoundaryIoU(2).update([prediction], [reference]).compute()
    # the rim of the image agrees, the pixels around the wrong one are a boundary in the prediction only
    assert result["per_category_boundary_iou"] == [32 / (32 + 8), 0.0]


def test_what_is_predicted_on_void_does_not_matter_and_void_makes_no_boundary():
    rng = np.random.RandomState(3)
    truth = np.kron(rng.randint(0, 3, (4, 4)), np.ones((8, 8), dtype=np.int64))
    reference = truth.copy()
    reference[:, 11:14] = 255  # a strip between objects
    reference[20:, 20:] = 255
    for anything in (0, 1, 2, 255, 77):
        prediction = np.where(reference == 255, anything, truth)
        result = BoundaryIoU(3, dilation_ratio=0.05).update([prediction], [reference]).compute()
        assert result["per_category_boundary_iou"] == [1.0, 1.0, 1.0]

    metric = BoundaryIoU(1, dilation_ratio=0.05)  # width 2
    metric.update(
        [np.zeros((24, 32), dtype=np.int64)], [np.pad(np.zeros((8, 16), dtype=np.int64), 8, constant_values=255)]
    )
    assert metric.union.tolist() == [0]  # surrounded by void only: nothing to compare


def test_boundary_across_a_strip_of_void():
    reference = np.array([[0] * 5 + [255] + [1] * 5] * 11)
    metric = BoundaryIoU(2, dilation_ratio=0.13).update([np.where(reference == 255, 0, reference)], [reference])
    assert boundary_width((11, 11), 0.13) == 2
    # Of the 5 x 11 pixels of class 0 only rows 2..8 of columns 2 and 3 are interior: column 4 is 2 pixels away from
    # class 1, across the void. Class 1 is its mirror image.
    assert metric.union.tolist() == [55 - 7 * 2, 55 - 7 * 2]
    assert metric.compute()["boundary_iou"] == 1.0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_256_classes_with_void_outside(dtype):
    labels = np.full((8, 8), 255, dtype=np.int64)
    labels[:, 4:] = 254
    reference = labels.copy()
    reference[0, 0] = -1
    metric = BoundaryIoU(256, ignore_index=-1).update([labels.astype(dtype)], [reference])
    assert metric.union[[254, 255]].tolist() == [20, 19]
    assert metric.compute()["boundary_iou"] == 1.0


def random_maps(seed, count=6):
    rng = np.random.RandomState(seed)
    maps = [rng.randint(0, 3, rng.randint(8, 20, 2)) for _ in range(count)]
    predictions = [np.where(rng.random_sample(labels.shape) < 0.2, 0, labels) for labels in maps]
    return predictions, [np.where(rng.random_sample(labels.shape) < 0.1, 255, labels) for labels in maps]


def test_merge_equals_one_pass_in_any_order():
    predictions, references = random_maps(4)
    whole = BoundaryIoU(3).update(predictions, references)
    first = BoundaryIoU(3).update(predictions[4:], references[4:])
    merged = first.merge(BoundaryIoU(3).update(predictions[3::-1], references[3::-1]))
    assert merged.compute() == whole.compute()
    assert merged.num_images == whole.num_images == 6
    assert math.isnan(merged.reset().compute()["boundary_iou"])


def test_merge_refuses_another_width():
    with pytest.raises(ValueError, match=r"dilation_ratio must be 0\.02"):
        BoundaryIoU(3).merge(BoundaryIoU(3, dilation_ratio=0.05))


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((4, 4), dtype=int), np.zeros((4, 5), dtype=int), r"image 0: prediction has shape \(4, 4\)"),
        (np.full((4, 4), 3), np.zeros((4, 4), dtype=int), r"prediction: label 3 is outside the allowed 0\.\.2"),
        (np.zeros((4, 4), dtype=int), np.full((4, 4), -1), r"reference \(ignore_index 255 apart\): label -1"),
        (np.zeros((4, 4)), np.zeros((4, 4), dtype=int), "must hold integers, got float64"),
        (np.zeros((1, 4, 4), dtype=int), np.zeros((4, 4), dtype=int), r"must have shape \(H, W\), got \(1, 4, 4\)"),
    ],
)
def test_bad_input(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        BoundaryIoU(3).update([prediction], [reference])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"num_labels": 3, "ignore_index": 2}, r"ignore_index must be outside the classes 0\.\.2, got 2"),
        ({"num_labels": 3, "dilation_ratio": 0}, "dilation_ratio must be above 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoundaryIoU(**arguments)


def test_tensors_and_evaluate_module():
    predictions, references = random_maps(5)
    expected = BoundaryIoU(3).update(predictions, references).compute()
    tensors = BoundaryIoU(3).update(
        [torch.tensor(one) for one in predictions], [torch.tensor(one) for one in references]
    )
    assert tensors.compute() == expected
    module = BoundaryIoU(3).as_evaluate_module()
    assert module.compute(predictions=predictions, references=references) == expected
