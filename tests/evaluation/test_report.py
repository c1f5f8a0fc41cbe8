"""The files of a report: what stands in the tables, and that the pictures show what they should."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.evaluation.confusion_plot import MAX_NAME, plot_confusion_matrix
from hf_maskformer.evaluation.details import Confusion, EvaluationDetails, ImageResult, class_segments
from hf_maskformer.evaluation.report import CELL_WIDTH, per_class_rows, truth_map, worst_images_sheet, write_report
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.palette import id_color
from hf_maskformer.visualize import ERROR
from model_answers import row_of_map

SPEC = LabelSpec({0: "road", 1: "car"}, thing_label_ids=(1,))
BLUE_OVER_RED = 40


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_blue(picture):
    return bool(((picture[..., 2] - picture[..., 0]) > BLUE_OVER_RED).any())


def has_orange(picture):
    return bool(((picture[..., 0] - picture[..., 2]) > BLUE_OVER_RED).any())


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def data(tmp_path):
    """Two images of 20 x 30: the left half road, the right half car, one row of void."""
    labels = np.zeros((20, 30), dtype=np.int64)
    labels[:, 15:] = 1
    labels[0] = 255
    rows = []
    for index in range(2):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (30, 20), (120, 120, 120)).save(path)
        rows.append({**row_of_map(labels, name=path.name), "image": {"bytes": None, "path": str(path)}})
    return SegmentationData(rows, SPEC, "semantic", "semantic_maps")


@pytest.fixture
def details(data):
    """The first image is all right, in the second all is road."""
    details = EvaluationDetails(worst=2)
    details.score_name = "mean IoU"
    right = np.zeros((20, 30), dtype=np.int64)
    right[:, 15:] = 1
    for index, (label_map, score) in enumerate(((right, 1.0), (np.zeros_like(right), 0.25))):
        details.add(index, data.row(index), ImageResult(score, label_map, class_segments(label_map)))
    details.add_unread(None, "left_out.png")
    details.add_unread(2, "2.png")
    names = ["road", "car"]
    details.complete(Confusion(np.array([[570, 0], [285, 285]]), names, names, "pixels"))
    return details


METRICS = {"mean_iou": 0.5, "per_category_iou": [2 / 3, math.nan], "per_category_accuracy": [1.0, 0.5]}


def test_the_files_of_a_report(data, details, tmp_path):
    folder = tmp_path / "deep" / "report"
    files = write_report(folder, METRICS, data, "semantic", details)
    assert sorted(files) == sorted(folder.iterdir())
    assert {file.name for file in files} == {
        *("metrics.json", "table.txt", "per_class.csv", "images.csv"),
        *("confusion_matrix.csv", "confusion_matrix.png", "worst_images.png"),
    }
    assert json.loads((folder / "metrics.json").read_text())["per_category_iou"] == [2 / 3, None]
    assert "mean_iou  0.5000" in (folder / "table.txt").read_text()
    assert read_csv(folder / "per_class.csv") == [
        ["id", "class", "kind", "iou", "accuracy"],
        ["0", "road", "stuff", str(2 / 3), "1.0"],
        ["1", "car", "thing", "", "0.5"],
    ]
    assert read_csv(folder / "confusion_matrix.csv") == [
        ["truth \\ prediction (pixels)", "road", "car"],
        ["road", "570", "0"],
        ["car", "285", "285"],
    ]
    assert read_csv(folder / "images.csv") == [
        ["index", "file_name", "mean IoU", "note"],
        ["0", "0.png", "1.0", ""],
        ["1", "1.png", "0.25", ""],
        ["2", "2.png", "", "cannot be read"],
        ["", "left_out.png", "", "cannot be read"],
    ]


def test_a_report_needs_filled_details_and_no_worst_images(data, details, tmp_path):
    with pytest.raises(ValueError, match="details must have been handed to evaluate"):
        write_report(tmp_path, METRICS, data, "semantic", EvaluationDetails())
    none = EvaluationDetails(worst=0)
    none.complete(details.confusion)
    assert "worst_images.png" not in [path.name for path in write_report(tmp_path, METRICS, data, "semantic", none)]


def test_dicts_of_pq_become_columns_and_absent_classes_are_empty():
    metrics = {
        "pq": 0.5,
        "per_category": [{"pq": 0.0, "true_positives": 0}, {"pq": 0.9, "true_positives": 4}],
        "boundary_per_category": [{"pq": 0.3, "true_positives": 1}, {"pq": 0.0, "true_positives": 0}],
        "map_per_category": [-1.0, 0.25],
        "per_category_boundary_map": [0.1, math.nan],
    }
    assert per_class_rows(metrics, SPEC) == [
        [
            "id",
            "class",
            "kind",
            "pq",
            "true_positives",
            "boundary_pq",
            "boundary_true_positives",
            "map",
            "boundary_map",
        ],
        [0, "road", "stuff", None, 0, 0.3, 1, None, 0.1],
        [1, "car", "thing", 0.9, 4, None, 0, 0.25, None],
    ]


def test_the_sheet_shows_the_worst_first_with_its_errors(data, details):
    sheet = np.asarray(worst_images_sheet(details.worst, data, "semantic", "mean IoU")).astype(int)
    height = sheet.shape[0]
    reddish = (sheet[..., 0] - sheet[..., 1] > 100) & (np.abs(sheet[..., 1] - sheet[..., 2]) < 30)
    rows = np.flatnonzero(reddish[:, sheet.shape[1] * 3 // 4 :].any(axis=1))
    assert rows.max() < height // 2  # only the first row, of the second image, has wrong pixels
    assert rows.size > 50
    colors = {tuple(color) for color in sheet[height * 9 // 10 :].reshape(-1, 3)}
    assert {id_color(0), id_color(1)} <= colors  # the legend
    assert tuple(ERROR) not in colors


def test_truth_of_each_task():
    ids, void = np.array([[255, 0, 1]]), [True, False, False]
    row = row_of_map(ids)
    (semantic, segments), hatched = truth_map(row, "semantic", SPEC)
    assert semantic.tolist() == [[0, 1, 2]]
    assert [(one["id"], one["label_id"]) for one in segments] == [(1, 0), (2, 1)]
    assert hatched.tolist() == [void]
    (panoptic, segments), hatched = truth_map(row, "panoptic", SPEC)
    assert [panoptic[0, 1], panoptic[0, 2]] == [segments[0]["id"], segments[1]["id"]]
    assert hatched.tolist() == [void]
    (instance, segments), crowd = truth_map(row, "instance", SPEC)
    assert instance.tolist() == [[0, 0, 1]]
    assert segments == [{"id": 1, "label_id": 1}]
    assert not crowd.any()


@pytest.mark.parametrize("ignore_index", [-1, -100, 255])
def test_void_may_be_negative(ignore_index):
    spec = LabelSpec({0: "road", 1: "car"}, ignore_index=ignore_index)
    row = row_of_map(np.array([[ignore_index, 0, 1]]), ignore_index)
    (ids, segments), void = truth_map(row, "semantic", spec)
    assert ids.tolist() == [[0, 1, 2]]
    assert [(one["id"], one["label_id"]) for one in segments] == [(1, 0), (2, 1)]
    assert void.tolist() == [[True, False, False]]


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2)])
def test_the_sheet_of_a_narrow_image_stays_small(size, tmp_path):
    labels = np.zeros(size, dtype=np.int64)
    Image.new("RGB", size[::-1]).save(tmp_path / "a.png")
    row = {**row_of_map(labels, name="a.png"), "image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    data = SegmentationData([row], SPEC, "semantic", "semantic_maps")
    details = EvaluationDetails(worst=1)
    details.add(0, row, ImageResult(0.5, labels, class_segments(labels)))
    sheet = worst_images_sheet(details.worst, data, "semantic", "mean IoU")
    assert sheet.height < 3 * CELL_WIDTH
    assert sheet.width < 5 * CELL_WIDTH


@pytest.mark.parametrize("classes", [1, 2, 11, 34, 150])
def test_plots_of_any_number_of_classes(classes, tmp_path):
    names = [f"a class with a rather long name, number {index}" for index in range(classes)]
    right = Confusion(np.eye(classes, dtype=np.int64) * 7, names, names, "pixels")
    plot_confusion_matrix(right, tmp_path / "right.png")
    assert has_blue(pixels(tmp_path / "right.png"))
    assert not has_orange(pixels(tmp_path / "right.png"))
    missed = Confusion(
        np.concatenate([np.zeros((classes, classes), dtype=np.int64), np.full((classes, 1), 3)], axis=1),
        names,
        [*names, "no segment"],
        "pixels",
    )
    plot_confusion_matrix(missed, tmp_path / "missed.png")
    assert has_orange(pixels(tmp_path / "missed.png"))
    assert not has_blue(pixels(tmp_path / "missed.png"))
    assert len(names[0]) > MAX_NAME


def test_classes_that_never_occur_are_left_out_of_large_plots(tmp_path):
    names = [str(index) for index in range(100)]
    matrix = np.zeros((100, 100), dtype=np.int64)
    plot_confusion_matrix(Confusion(matrix, names, names, "pixels"), tmp_path / "empty.png")
    matrix[3, 7] = 5
    plot_confusion_matrix(Confusion(matrix, names, names, "pixels"), tmp_path / "two.png")
    assert pixels(tmp_path / "two.png").shape[0] < pixels(tmp_path / "empty.png").shape[0] / 3
    assert has_orange(pixels(tmp_path / "two.png"))
