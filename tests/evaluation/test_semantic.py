"""MeanIoU: hand-sized tables, the published formulas on random maps, streaming and errors."""

import numpy as np
import pytest
import torch

from hf_maskformer.evaluation import MeanIoU

REFERENCE = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [255, 255, 2, 2]])
PREDICTION = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 2, 0], [1, 0, 2, 2]])


def mean_iou_by_histograms(predictions, references, num_labels, ignore_index):
    """The formulas of `evaluate`'s mean_iou: one histogram per image for intersection, prediction and reference."""
    totals = np.zeros((3, num_labels))
    for prediction, reference in zip(predictions, references, strict=True):
        counted = reference != ignore_index
        prediction, reference = prediction[counted], reference[counted]
        for row, values in enumerate((prediction[prediction == reference], prediction, reference)):
            totals[row] += np.histogram(values, bins=np.arange(num_labels + 1))[0]
    intersection, predicted, actual = totals
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = intersection / (predicted + actual - intersection)
        accuracy = intersection / actual
    return {
        "mean_iou": np.nanmean(iou),
        "overall_accuracy": intersection.sum() / actual.sum(),
        "mean_accuracy": np.nanmean(accuracy),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_same(result, expected, tolerance=1e-12):
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(result[key], value, rtol=0, atol=tolerance, err_msg=key)


def test_hand_sized_table():
    result = MeanIoU(4).update([PREDICTION], [REFERENCE]).compute()
    # class 0: 3 of 4 hit, 1 elsewhere; class 1: all 4 hit, 1 elsewhere; class 2: 5 of 6 hit; class 3: nowhere
    assert result["per_category_iou"][:3] == [3 / 5, 4 / 5, 5 / 6]
    assert result["per_category_accuracy"][:3] == [3 / 4, 1.0, 5 / 6]
    assert np.isnan(result["per_category_iou"][3])
    assert np.isnan(result["per_category_accuracy"][3])
    assert result["mean_iou"] == pytest.approx((3 / 5 + 4 / 5 + 5 / 6) / 3, abs=1e-12)
    assert result["mean_accuracy"] == pytest.approx((3 / 4 + 1 + 5 / 6) / 3, abs=1e-12)
    assert result["overall_accuracy"] == 12 / 14


def test_class_that_is_only_predicted_has_iou_zero():
    result = MeanIoU(2).update([np.array([[0, 1]])], [np.array([[0, 0]])]).compute()
    assert result["per_category_iou"] == [0.5, 0.0]
    assert result["mean_iou"] == 0.25
    assert result["mean_accuracy"] == 0.5
    assert np.isnan(result["per_category_accuracy"][1])


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_published_formulas(seed):
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 12))
    shapes = rng.integers(1, 30, size=(int(rng.integers(1, 5)), 2))
    references = [rng.integers(0, num_labels, size=shape) for shape in shapes]
    predictions = [rng.integers(0, num_labels, size=shape) for shape in shapes]
    for reference in references[1:]:  # the first image keeps at least one counted pixel
        reference[rng.random(reference.shape) < 0.2] = 255
    expected = mean_iou_by_histograms(predictions, references, num_labels, 255)
    assert_same(MeanIoU(num_labels).update(predictions, references).compute(), expected)


def test_tensors_of_any_integer_type():
    metric = MeanIoU(4)
    metric.update([torch.from_numpy(PREDICTION).to(torch.int32)], [REFERENCE.astype(np.uint8)])
    assert_same(metric.compute(), MeanIoU(4).update([PREDICTION], [REFERENCE]).compute())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64, np.int32])
def test_void_index_with_small_and_unsigned_types(dtype):
    reference = np.array([[0, 1, 1, 0]], dtype=dtype)
    metric = MeanIoU(120, void_index=125).update([np.array([[0, 1, 125, 0]], dtype=dtype)], [reference])
    assert metric.compute()["per_category_iou"][:2] == [1.0, 0.5]


def test_merge_is_one_pass():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 5, size=(2, 6, 8, 9))
    whole = MeanIoU(5).update(predictions, references)
    first, second = MeanIoU(5).update(predictions[:2], references[:2]), MeanIoU(5)
    second.update(predictions[2:4], references[2:4]).update(predictions[4:], references[4:])
    assert first.merge(second) is first
    assert first.compute() == whole.compute()
    assert first.num_images == 6


def test_compute_keeps_and_reset_clears_the_state():
    metric = MeanIoU(4).update([PREDICTION], [REFERENCE])
    assert metric.compute()["mean_iou"] == metric.compute()["mean_iou"]
    assert np.isnan(metric.reset().compute()["mean_iou"])


def test_nothing_counted_is_nan():
    result = MeanIoU(2).update([np.zeros((2, 2), int)], [np.full((2, 2), 255)]).compute()
    assert np.isnan(result["mean_iou"])
    assert np.isnan(result["overall_accuracy"])


def test_void_prediction_is_a_miss_but_no_false_positive():
    metric = MeanIoU(2, void_index=-1).update([np.array([[0, -1, 1, -1]])], [np.array([[0, 0, 1, 255]])])
    assert metric.compute()["per_category_iou"] == [0.5, 1.0]
    assert metric.compute()["overall_accuracy"] == 2 / 3


@pytest.mark.parametrize("value", [4, -1, 255, 1000])
def test_prediction_outside_the_classes_is_named(value):
    prediction = PREDICTION.copy()
    prediction[0, 0] = value
    with pytest.raises(ValueError, match=rf"image 1, prediction: label {value} .* 0\.\.3"):
        MeanIoU(4).update([PREDICTION, prediction], [REFERENCE, REFERENCE])


def test_reference_outside_the_classes_is_named():
    with pytest.raises(ValueError, match=r"image 0, reference .*label 2 .* 0\.\.1"):
        MeanIoU(2).update([np.zeros((4, 4), int)], [REFERENCE])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (np.zeros((3, 4), int), r"shape \(3, 4\) but reference \(4, 4\)"),
        (np.zeros((1, 4, 4), int), r"must have shape \(H, W\)"),
        (np.zeros((4, 4)), "must hold integers, got float64"),
    ],
)
def test_wrong_maps_are_refused(prediction, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(4).update([prediction], [REFERENCE])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        MeanIoU(4).update([PREDICTION], [REFERENCE, REFERENCE])
    with pytest.raises(ValueError, match="ignore_index must be outside"):
        MeanIoU(4, ignore_index=0)
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        MeanIoU(0)
    with pytest.raises(ValueError, match=r"other\.num_labels must be 4 .* got 3"):
        MeanIoU(4).merge(MeanIoU(3))
