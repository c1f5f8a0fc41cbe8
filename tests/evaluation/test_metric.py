"""What all metrics share: pickling, merging and the bridge to `evaluate`."""

import pickle

import numpy as np
import pytest

from hf_maskformer.evaluation import BoundaryIoU, MaskAveragePrecision, MeanIoU, PanopticQuality, VolumeDice

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


def test_merging_another_metric_is_refused():
    with pytest.raises(ValueError, match="other must be a MeanIoU, got PanopticQuality"):
        MeanIoU(2).merge(PanopticQuality([1], 2))
