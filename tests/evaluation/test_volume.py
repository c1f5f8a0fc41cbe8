"""VolumeDice by hand: spacing, surfaces, absent classes; the definition taken literally on random volumes."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from hf_maskformer.evaluation import VolumeDice, format_table


def literal_hd95(predicted, actual, spacing):
    """All distances between all surface voxels."""
    points = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing) for mask in (predicted, actual)]
    table = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(axis=2))
    return max(np.percentile(table.min(axis=1), 95), np.percentile(table.min(axis=0), 95))


def volume(*voxels, shape=(4, 4, 4), label=1):
    labels = np.zeros(shape, dtype=np.int64)
    for voxel in voxels:
        labels[voxel] = label
    return labels


def with_spacing(labels, *spacing):
    return {"segmentation": labels, "spacing": spacing}


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)  # nan equals nan


def test_one_voxel_each():
    prediction, reference = volume((0, 0, 0)), volume((2, 3, 0))
    result = VolumeDice(2).update([prediction], [with_spacing(reference, 2.0, 1.0, 0.5)]).compute()
    assert result["dice"] == 0.0
    assert result["hd95"] == 5.0  # 2 slices of 2 mm, 3 rows of 1 mm: 4, 3, 5
    assert result["per_category_dice"][1:] == [0.0]
    assert math.isnan(result["per_category_dice"][0])  # the background is no class of its own
    assert VolumeDice(2).update([prediction], [reference]).compute()["hd95"] == math.sqrt(13)  # in voxels


def test_dice_and_hd95_of_shifted_boxes():
    reference, prediction = np.zeros((2, 9, 9), dtype=np.int64)
    reference[2:6, 2:6] = 1
    prediction[2:6, 3:7] = 1
    result = VolumeDice(2).update([prediction], [with_spacing(reference, 1.0, 3.0)]).compute()
    assert result["dice"] == 2 * 12 / (16 + 16)
    # 12 surface pixels each; the far column of 4 is one step of 3 mm away, the inner ones 1 mm from a row
    assert result["hd95"] == 3.0


def test_hd95_is_a_percentile_of_each_direction():
    reference, prediction = np.zeros((2, 1, 60), dtype=np.int64)
    reference[0, :40] = 1
    prediction[0, :42] = 1  # 42 distances, the largest are 1 and 2: position 0.95 * 41 = 38.95 lies before them
    assert VolumeDice(2).update([prediction], [reference]).compute()["hd95"] == 0.0
    prediction[0, :44] = 1  # 44 distances, 1, 2, 3, 4 at positions 40..43: 0.95 * 43 = 40.85
    assert VolumeDice(2).update([prediction], [reference]).compute()["hd95"] == pytest.approx(1.85, abs=1e-12)
    assert VolumeDice(2).update([reference], [prediction]).compute()["hd95"] == pytest.approx(1.85, abs=1e-12)


def test_only_surfaces_count_and_the_border_is_a_surface():
    full = np.ones((5, 5, 5), dtype=np.int64)  # 98 surface voxels
    hollow = full.copy()
    hollow[2, 2, 2] = 0  # 6 more, each 1 away from the full volume's surface
    result = VolumeDice(2).update([hollow], [full]).compute()
    assert result["dice"] == 2 * 124 / (124 + 125)
    assert result["hd95"] == pytest.approx(0.85, abs=1e-12)  # of 104 distances: position 0.95 * 103 = 97.85


def test_means_over_volumes_then_classes():
    references = [volume((0, 0, 0)) + volume((3, 3, 3), label=2), volume((0, 0, 0)), volume((0, 0, 0))]
    predictions = [references[0], volume((0, 0, 1)), volume((0, 0, 0))]
    result = VolumeDice(3).update(predictions, references).compute()
    assert result["per_category_dice"][1:] == [2 / 3, 1.0]
    assert result["dice"] == (2 / 3 + 1.0) / 2
    assert result["per_category_hd95"][1:] == [1 / 3, 0.0]
    assert result["hd95"] == 1 / 6


def test_absent_classes_are_left_out_and_counted():
    here, there = volume((1, 1, 1)), volume((2, 2, 2), label=2)
    nothing = np.zeros((4, 4, 4), dtype=np.int64)
    # missed class 1; invented class 2; class 3 in neither
    result = VolumeDice(4).update([there], [here]).compute()
    assert result["per_category_dice"][1] == 0.0
    assert all(math.isnan(value) for value in result["per_category_dice"][2:] + result["per_category_hd95"])
    assert result["dice"] == 0.0
    assert math.isnan(result["hd95"])
    assert (result["dice_undefined"], result["hd95_undefined"]) == (2, 3)
    assert result["per_category_missed"] == [0, 1, 0, 0]
    assert result["per_category_invented"] == [0, 0, 1, 0]
    # one good volume more: the undefined pairs do not pull its figures down
    result = VolumeDice(4).update([there, here, nothing], [here, here, nothing]).compute()
    assert result["per_category_dice"][1] == 0.5
    assert result["per_category_hd95"][1] == 0.0
    assert (result["dice_undefined"], result["hd95_undefined"]) == (7, 8)  # of 9 pairs


def test_nothing_added():
    result = VolumeDice(3).compute()
    assert math.isnan(result["dice"])
    assert math.isnan(result["hd95"])
    assert result["dice_undefined"] == 0


def test_background_may_be_a_class_or_another_label():
    reference = volume((0, 0, 0), (0, 0, 1))
    prediction = volume((0, 0, 0))
    counted = VolumeDice(2, background=None).update([prediction], [reference]).compute()
    assert counted["per_category_dice"] == [2 * 62 / (62 + 63), 2 / 3]
    flipped = VolumeDice(2, background=1).update([1 - prediction], [1 - reference]).compute()
    assert flipped["per_category_dice"][0] == 2 / 3
    assert math.isnan(flipped["per_category_dice"][1])


def test_void_voxels_belong_to_no_class():
    reference = np.array([[1, 1, 255, 0, 0], [1, 1, 255, 0, 0]])
    results = [
        VolumeDice(2).update([np.array([[1, 1, value, 0, 0], [1, 0, value, 0, 0]])], [reference]).compute()
        for value in (0, 1, 255)
    ]
    assert results[0]["dice"] == 2 * 3 / (3 + 4)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_hd95_equals_the_definition_on_random_volumes():
    rng = np.random.RandomState(0)
    for index in range(40):
        shape = rng.randint(1, 8, 2 + index % 2)
        actual, predicted = rng.random_sample((2, *shape)) < 0.6
        if not (actual.any() and predicted.any()):
            continue
        spacing = rng.uniform(0.3, 4, len(shape))
        reference = {"segmentation": actual.astype(np.int64), "spacing": spacing}
        result = VolumeDice(2).update([predicted.astype(np.int64)], [reference]).compute()
        assert result["hd95"] == pytest.approx(literal_hd95(predicted, actual, spacing), abs=1e-12)
        assert result["dice"] == 2 * (actual & predicted).sum() / (actual.sum() + predicted.sum())


def random_volumes(count=6):
    rng = np.random.RandomState(1)
    references = [rng.randint(0, 3, rng.randint(2, 9, 3)) for _ in range(count)]
    predictions = [np.where(rng.random_sample(labels.shape) < 0.3, 0, labels) for labels in references]
    return predictions, [with_spacing(labels, *rng.uniform(0.5, 3, 3)) for labels in references]


def test_merge_equals_one_pass_in_any_order():
    predictions, references = random_volumes()
    whole = VolumeDice(3).update(predictions, references)
    second = VolumeDice(3).update(predictions[:4], references[:4])
    merged = VolumeDice(3).update(predictions[:3:-1], references[:3:-1]).merge(second)
    assert merged.num_images == whole.num_images == 6
    assert_same(merged.compute(), whole.compute())
    with pytest.raises(ValueError, match="background must be 0"):
        whole.merge(VolumeDice(3, background=None))
    assert math.isnan(whole.reset().compute()["dice"])


def test_state_does_not_grow():
    metric = VolumeDice(3)
    for _ in range(3):
        metric.update(*random_volumes())
    arrays = [value for value in vars(metric).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 6
    assert all(array.shape == (3,) for array in arrays)


def test_tensors_table_and_evaluate_module():
    predictions, references = random_volumes()
    expected = VolumeDice(3).update(predictions, references).compute()
    tensors = [{**entry, "segmentation": torch.tensor(entry["segmentation"])} for entry in references]
    result = VolumeDice(3).update([torch.tensor(one) for one in predictions], tensors).compute()
    assert_same(result, expected)
    module = VolumeDice(3).as_evaluate_module()
    assert_same(module.compute(predictions=predictions, references=references), expected)
    table = format_table(expected, {0: "background", 1: "anterior", 2: "posterior"})
    assert table.splitlines()[0].split() == ["class", "dice", "hd95", "missed", "invented"]
    assert table.splitlines()[2].split() == ["background", "-", "-", "0", "0"]


CUBE = np.zeros((2, 2, 2), dtype=np.int64)


def test_spacing_may_be_rounded():
    given = {"segmentation": CUBE, "spacing": np.array([0.7, 0.7, 3], dtype=np.float32)}
    metric = VolumeDice(2).update([given, with_spacing(CUBE, 0.7, 0.7, 3)], [with_spacing(CUBE, 0.7, 0.7, 3), given])
    assert metric.num_images == 2
    with pytest.raises(ValueError, match="prediction has spacing"):
        VolumeDice(2).update([with_spacing(CUBE, 0.7, 0.7, 3.01)], [given])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (CUBE, np.zeros((2, 2, 3), dtype=int), r"image 0: prediction has shape \(2, 2, 2\) but reference \(2, 2, 3\)"),
        (CUBE + 2, CUBE, r"image 0, prediction: label 2 is outside the allowed 0\.\.1"),
        (CUBE, CUBE - 1, r"reference \(ignore_index 255 apart\): label -1"),
        (CUBE, CUBE.astype(float), "reference: labels must be integers, got float64"),
        (CUBE[None], CUBE[None], r"must have shape \(D, H, W\) or \(H, W\), got \(1, 2, 2, 2\)"),
        (CUBE, with_spacing(CUBE, 1.0, 1.0), r"spacing must be 3 positive lengths, got \(1\.0, 1\.0\)"),
        (CUBE, with_spacing(CUBE, 1.0, 0.0, 1.0), "spacing must be 3 positive lengths"),
        (CUBE, with_spacing(CUBE, 1.0, math.nan, 1.0), "spacing must be 3 positive lengths"),
        (with_spacing(CUBE, 1.0, 1.0, 2.0), with_spacing(CUBE, 1.0, 1.0, 1.0), r"prediction has spacing .* 2\.0\)"),
        (with_spacing(CUBE, 1.0, 1.0, 2.0), CUBE, "but reference None"),
        (CUBE, {"segmentation": CUBE, "spacing": 1.0}, r"reference: spacing must be 3 positive lengths, got 1\.0"),
        (CUBE, with_spacing(CUBE, "a", "b", "c"), "reference: spacing must be 3 positive lengths"),
        (CUBE, {"spacing": (1, 1, 1)}, "reference: segmentation is missing, the entry has only"),
    ],
)
def test_bad_input(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        VolumeDice(2).update([prediction], [reference])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"num_labels": 2, "background": 2}, r"background must be one of the labels 0\.\.1 or None, got 2"),
        ({"num_labels": 2, "background": "0"}, "background must be an integer, got '0'"),
        ({"num_labels": 2, "ignore_index": 1}, r"ignore_index must be outside the classes 0\.\.1, got 1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        VolumeDice(**arguments)
