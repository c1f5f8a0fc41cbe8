"""The table for people."""

import numpy as np
import pytest

from hf_maskformer.evaluation import BoundaryIoU, MeanIoU, PanopticQuality, VolumeDice, format_table
from hf_maskformer.evaluation.table import class_columns


def test_semantic_table():
    metrics = MeanIoU(3).update([np.array([[0, 1]])], [np.array([[0, 0]])]).compute()
    assert format_table(metrics, {0: "road", 1: "car", 2: "tree"}).splitlines() == [
        "class     iou  accuracy",
        "-----------------------",
        "road   0.5000    0.5000",
        "car    0.0000         -",
        "tree        -         -",
        "-----------------------",
        "mean_iou          0.2500",
        "overall_accuracy  0.5000",
        "mean_accuracy     0.5000",
    ]


def test_panoptic_table_shows_absent_classes_as_absent():
    entry = {"segmentation": np.ones((2, 2), int), "segments_info": [{"id": 1, "label_id": 0}]}
    metrics = PanopticQuality([0], 2).update([entry], [entry]).compute()
    lines = format_table({**metrics, "map_per_category": [1.0, -1.0]}, {0: "nucleus", 1: "background"}).splitlines()
    assert lines[0].split() == ["class", "pq", "sq", "rq", "TP", "FP", "FN", "map"]
    assert lines[2].split() == ["nucleus", "1.0000", "1.0000", "1.0000", "1", "0", "0", "1.0000"]
    assert lines[3].split() == ["background", "-", "-", "-", "0", "0", "0", "-"]
    assert "pq_stuff   -" in lines


def test_boundary_figures_stand_beside_the_others():
    labels = np.zeros((6, 6), dtype=int)
    entry = {"segmentation": labels + 1, "segments_info": [{"id": 1, "label_id": 0}]}
    metrics = MeanIoU(2).update([labels], [labels]).compute()
    metrics |= BoundaryIoU(2).update([labels], [labels]).compute()
    boundary = PanopticQuality([0], 2, boundary=True).update([entry], [entry]).compute()
    metrics |= {"boundary_pq": boundary["pq"], "boundary_per_category": boundary["per_category"]}
    metrics["per_category_boundary_map"] = [0.5, -1.0]
    lines = format_table(metrics, {0: "nucleus", 1: "background"}).splitlines()
    qualities = [f"boundary_{name}" for name in ("pq", "sq", "rq", "TP", "FP", "FN")]
    assert lines[0].split() == ["class", "iou", "accuracy", "boundary_iou", *qualities, "boundary_map"]
    assert lines[2].split() == ["nucleus", "1.0000", "1.0000", "1.0000", *["1.0000"] * 3, "1", "0", "0", "0.5000"]
    assert lines[3].split() == ["background", *["-"] * 6, "0", "0", "0", "-"]
    assert "boundary_pq       1.0000" in lines


def test_volume_table():
    volume = np.zeros((3, 4, 4), dtype=int)
    volume[1, 1:3, 1:3] = 1
    metrics = VolumeDice(3).update([volume], [volume]).compute()
    lines = format_table(metrics, {0: "background", 1: "anterior", 2: "posterior"}).splitlines()
    assert lines[0].split() == ["class", "dice", "hd95", "missed", "invented"]
    assert lines[3].split()[:3] == ["anterior", "1.0000", "0.0000"]
    assert lines[4].split()[:3] == ["posterior", "-", "-"]
    assert any(line.split() == ["dice", "1.0000"] for line in lines)


def test_columns_keep_numbers_and_have_none_for_absent_classes():
    counts = {"true_positives": 0, "false_positives": 0, "false_negatives": 0}
    metrics = {
        "map": 0.5,
        "per_category_iou": [0.0, float("nan")],
        "map_per_category": [-1.0, 0.0],
        "boundary_per_category": [{"pq": 0.0, **counts}, {"pq": 0.0, **counts, "false_negatives": 2}],
    }
    assert class_columns(metrics, 2) == {
        "iou": [0.0, None],
        "map": [None, 0.0],
        "boundary_pq": [None, 0.0],
        "boundary_true_positives": [0, 0],
        "boundary_false_positives": [0, 0],
        "boundary_false_negatives": [0, 2],
    }


def test_wrong_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="per_category has 2 entries but id2label 1 classes"):
        format_table({"per_category": [0.5, 0.5]}, {0: "one"})
