"""What all metrics share: pickling, merging and the bridge to `evaluate`."""

import pickle

import numpy as np
import pytest
import torch

from hf_maskformer.evaluation import BoundaryIoU, MaskAveragePrecision, MeanIoU, PanopticQuality, VolumeDice
from hf_maskformer.evaluation.metric import set_pixels, to_numpy, whole_numbers

MAP = np.array([[0, 0], [1, 1]])
PANOPTIC = {"segmentation": MAP + 1, "segments_info": [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]}
INSTANCES = {
    "masks": np.stack([MAP == 0, MAP == 1]),
    "scores": np.array([0.9, 0.8]),
    "labels": np.array([0, 1]),
}
CASES = [
    (lambda: MeanIoU(2), MAP, "mean_iou"),
    (lambda: PanopticQuality([1], 2), PANOPTIC, "pq"),
    (lambda: MaskAveragePrecision(2), INSTANCES, "map"),
    (lambda: PanopticQuality([1], 2, boundary=True), PANOPTIC, "pq"),
    (lambda: MaskAveragePrecision(2, iou_type="boundary"), INSTANCES, "map"),
    (lambda: BoundaryIoU(2), MAP, "boundary_iou"),
    (lambda: VolumeDice(2, background=None), np.stack([MAP, MAP]), "dice"),
]


@pytest.mark.parametrize(("build", "entry", "key"), CASES)
def test_state_travels_as_an_object(build, entry, key):
    metric = build().update([entry], [entry])
    assert build().merge(pickle.loads(pickle.dumps(metric))).compute() == metric.compute()


@pytest.mark.parametrize(("build", "entry", "key"), CASES)
def test_evaluate_module(build, entry, key, tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.chdir(tmp_path)
    metric = build()
    module = metric.as_evaluate_module()
    assert isinstance(module, evaluate.EvaluationModule)
    module.add_batch(predictions=[entry], references=[entry])
    module.add(prediction=entry, reference=entry)
    assert metric.num_images == 2
    assert module.compute()[key] == pytest.approx(1.0)
    assert metric.num_images == 0  # evaluate's compute forgets
    assert module.compute(predictions=[entry], references=[entry])[key] == pytest.approx(1.0)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_combine():
    evaluate = pytest.importorskip("evaluate")
    combined = evaluate.combine([metric.as_evaluate_module() for metric in (MeanIoU(2), MeanIoU(3, ignore_index=7))])
    combined.add(prediction=MAP, reference=MAP)
    combined.add_batch(predictions=[MAP], references=[MAP])
    result = combined.compute()
    assert sorted(value for key, value in result.items() if key.endswith("mean_iou")) == [1.0, 1.0]
    assert len(result) == 10  # five figures each, told apart by a prefix


def test_evaluate_module_accepts_its_own_settings_only():
    pytest.importorskip("evaluate")
    given = {"predictions": [MAP], "references": [MAP]}
    module = MeanIoU(2).as_evaluate_module()
    assert module.compute(**given, num_labels=2, ignore_index=255)["mean_iou"] == 1.0
    with pytest.raises(ValueError, match="ignore_index must be 255, with which the metric was made, got 7"):
        module.compute(**given, ignore_index=7)
    with pytest.raises(
        ValueError, match=r"preds is not a keyword of MeanIoU, allowed: \['predictions', 'references', "
    ):
        module.compute(preds=[MAP], refs=[MAP])
    with pytest.raises(ValueError, match="reduce_labels is not a keyword of MeanIoU"):
        module.add_batch(**given, reduce_labels=True)
    with pytest.raises(ValueError, match="num_labels must be 2"):
        module.add(prediction=MAP, reference=MAP, num_labels=3)
    quality = PanopticQuality([1, 0], 2).as_evaluate_module()
    panoptic = {"predictions": [PANOPTIC], "references": [PANOPTIC]}
    assert quality.compute(**panoptic, thing_label_ids=[0, 1])["pq"] == 1.0
    with pytest.raises(ValueError, match=r"thing_label_ids must be \(0, 1\), .* got \[0\]"):
        quality.compute(**panoptic, thing_label_ids=[0])


@pytest.mark.parametrize(("build", "entry", "key"), CASES)
def test_batches_that_are_none_are_refused(build, entry, key):
    with pytest.raises(ValueError, match="predictions must be a list, an array or a tensor, got generator"):
        build().update((one for one in [entry]), [entry])
    with pytest.raises(ValueError, match="references must be a list, an array or a tensor, got dict"):
        build().update([entry], {"one": entry})
    with pytest.raises(ValueError, match="predictions must be a list, an array or a tensor, got NoneType"):
        build().update(None, [entry])


@pytest.mark.parametrize(("build", "entry", "key"), CASES)
@pytest.mark.parametrize("wrong", [None, "a.png", 3, {}, [], [[1], [1, 2]], {"masks": None, "segmentation": None}])
def test_entries_of_another_kind_name_the_image(build, entry, key, wrong):
    with pytest.raises(ValueError, match="image 1, prediction"):
        build().update([entry, wrong], [entry, entry])
    with pytest.raises(ValueError, match="image 0, reference"):
        build().update([entry], [wrong])


@pytest.mark.parametrize(("build", "entry", "key"), CASES)
def test_missing_keys_name_the_image(build, entry, key):
    if not isinstance(entry, dict):
        entry = {"segmentation": entry}
    for missing in entry:
        rest = {name: value for name, value in entry.items() if name != missing}
        with pytest.raises(ValueError, match="image 0, prediction"):
            build().update([rest], [entry])


@pytest.mark.parametrize("wrong", ["2", 2.0, None])
@pytest.mark.parametrize("metric", [MeanIoU, BoundaryIoU, VolumeDice, MaskAveragePrecision])
def test_settings_of_another_type_are_refused(metric, wrong):
    with pytest.raises(ValueError, match="num_labels must be an integer, got"):
        metric(wrong)
    with pytest.raises(ValueError, match="num_labels must be an integer, got"):
        PanopticQuality([1], wrong)
    if "ignore_index" in metric.settings:
        with pytest.raises(ValueError, match="ignore_index must be an integer, got"):
            metric(2, ignore_index=wrong)
    if "dilation_ratio" in metric.settings:
        with pytest.raises(ValueError, match=r"dilation_ratio must be above 0 and at most 1, got '0\.1'"):
            metric(2, dilation_ratio="0.1")


def test_bfloat16_is_read():
    tensor = torch.tensor([[0, 1.5], [1, 0]], dtype=torch.bfloat16)
    np.testing.assert_array_equal(to_numpy(tensor), [[0, 1.5], [1, 0]])
    with pytest.raises(ValueError, match="image 0, prediction: a semantic map must hold integers, got float32"):
        MeanIoU(2).update([tensor], [MAP])
    masks = torch.tensor(INSTANCES["masks"]).to(torch.bfloat16)
    scores = torch.tensor([0.875, 0.75], dtype=torch.bfloat16)
    found = MaskAveragePrecision(2).update([{**INSTANCES, "masks": masks, "scores": scores}], [INSTANCES])
    assert found.compute()["map"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_pixels_that_are_set(dtype):
    mask = np.array([[0, 1], [1, 0]]).astype(dtype)
    assert set_pixels(mask).tolist() == [[False, True], [True, False]]
    assert set_pixels(mask).dtype == bool


def test_masks_of_other_numbers_are_refused():
    assert set_pixels(np.array([[0, 255]], dtype=np.uint8)).tolist() == [[False, True]]
    for value in (-8.0, 0.5, 255.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"may only hold 0 and 1, got {value}: apply a threshold first"):
            set_pixels(np.array([[0, 1, value]]))
    with pytest.raises(ValueError, match=r"must hold bool, integers or 0\.0 and 1\.0, got object"):
        set_pixels(np.array([[None]]))


def test_whole_numbers():
    found = whole_numbers([np.uint8(7), torch.tensor(3), 5.0, -(2**63), 2**63 - 1], "id")
    assert found.dtype == np.int64
    assert found.tolist() == [7, 3, 5, -(2**63), 2**63 - 1]
    assert whole_numbers([], "id").tolist() == []
    for value, message in (
        (1.7, "id must be a whole number, got 1.7"),
        ("1", "id must be a whole number, got '1'"),
        (float("nan"), "id must be a whole number, got nan"),
        (2**70, f"id must lie in .*, got {2**70}"),
    ):
        with pytest.raises(ValueError, match=message):
            whole_numbers([1, value], "id")


def test_merging_another_metric_is_refused():
    with pytest.raises(ValueError, match="other must be a MeanIoU, got PanopticQuality"):
        MeanIoU(2).merge(PanopticQuality([1], 2))
