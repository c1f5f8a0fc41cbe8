"""The picture of a log: it is drawn for any run, short or long, and what it shows is what was logged."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_maskformer.training import curves
from hf_maskformer.training.curves import MAIN_METRICS, draw_curves, read_log, series, smoothed
from hf_maskformer.training.run import MAIN_METRIC
from hf_maskformer.training.train import train


def training_line(step, **changes):
    terms = {"loss": 5.0, "loss_class": 1.0, "loss_mask": 0.1, "loss_dice": 0.8}
    return {"step": step, **terms, "learning_rate": 1e-3, "seconds_per_step": 0.5, "data_seconds": 0.1, **changes}


@pytest.fixture
def run_with(tmp_path):
    """A run's folder with this log."""

    def make(lines, cut=""):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
        return tmp_path

    return make


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, to look at what is on them."""
    drawn = []

    class Recorded(Figure):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            drawn.append(self)

    monkeypatch.setattr(curves, "Figure", Recorded)
    return drawn


def named_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


@pytest.mark.parametrize("count", [0, 1, 2, 59, 60, 10_000])
def test_any_number_of_points_is_drawn(run_with, count):
    lines = [training_line(step, loss=50.0 / step) for step in range(1, count + 1)]
    path = draw_curves(run_with(lines))
    with Image.open(path) as picture:
        assert path.name == "training_curves.png"
        assert picture.size == (1320, 792)
        assert np.asarray(picture).std() > 0


def test_panels_hold_what_was_logged(run_with, figures):
    log = [training_line(10), training_line(20, loss=4.0, loss_mask=0.2, data_seconds=0.25, learning_rate=5e-4)]
    log.append({"step": 20, "event": "evaluation", "images": 8, "pq": 0.3, "mean_iou": 0.9})
    draw_curves(run_with(log))
    losses, metric, rate, waiting = figures[0].axes
    assert list(named_lines(losses)) == ["class", "mask", "dice", "loss"]
    assert named_lines(losses)["loss"].get_xydata().tolist() == [[10, 5], [20, 4]]
    assert named_lines(losses)["mask"].get_ydata().tolist() == [0.1, 0.2]
    assert metric.get_title() == "pq: best 0.3000 at step 20"
    assert named_lines(metric)["on 8 images"].get_xydata().tolist() == [[20, 0.3]]
    assert rate.lines[0].get_ydata().tolist() == [1e-3, 5e-4]
    assert waiting.lines[0].get_ydata().tolist() == [20, 50]


def test_evaluations_on_other_images_stand_apart(run_with, figures):
    values = [(1, 4, 0.2), (2, 4, 0.4), (3, 4, 0.3), (3, 9, 0.7)]
    log = [{"step": step, "event": "evaluation", "images": count, "map": value} for step, count, value in values]
    draw_curves(run_with(log))
    metric = figures[0].axes[1]
    assert metric.get_title() == "map: best 0.4000 at step 2"
    assert named_lines(metric)["on 4 images"].get_ydata().tolist() == [0.2, 0.4, 0.3]
    assert named_lines(metric)["on 9 images"].get_xydata().tolist() == [[3, 0.7]]


def test_values_that_are_not_finite_leave_a_gap(run_with, figures):
    log = [training_line(1), training_line(2, loss=float("nan")), training_line(3, loss=None)]
    log += [{"step": 3, "event": "evaluation", "images": 2, "mean_iou": None}]
    draw_curves(run_with(log))
    losses, metric, _, _ = figures[0].axes
    assert np.isnan(named_lines(losses)["loss"].get_ydata()).tolist() == [False, True, True]
    assert metric.get_title() == "mean_iou"


def test_an_empty_panel_says_so(run_with, figures):
    draw_curves(run_with([]))
    assert [axes.texts[0].get_text() for axes in figures[0].axes] == ["nothing logged"] * 4


def test_many_terms_share_one_name(run_with, figures):
    terms = {f"loss_{number}": float(number + 1) for number in range(30)}
    draw_curves(run_with([{"step": 1, "loss": 9.0, **terms}]))
    assert len(named_lines(figures[0].axes[0])) == curves.MOST_NAMED_TERMS + 2
    assert "21 more terms" in named_lines(figures[0].axes[0])


def test_smoothing_keeps_a_slope_and_a_gap():
    slope = np.arange(500.0)
    assert smoothed(slope)[2:-2] == pytest.approx(slope[2:-2])
    assert smoothed(slope)[[0, -1]].tolist() == [1.0, 498.0]  # means of the first and last three
    noisy = np.tile([0.0, 2.0], 250)
    assert smoothed(noisy)[100:400] == pytest.approx(1.0, abs=0.06)
    noisy[7] = np.nan
    assert np.flatnonzero(np.isnan(smoothed(noisy))).tolist() == [7]


def test_a_last_line_cut_off_is_left_out_and_another_one_is_an_error(run_with):
    run = run_with([training_line(1)], cut='{"step": 2, "lo')
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [1]
    draw_curves(run)
    run = run_with([training_line(1)], cut='{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: .* is not a JSON object"):
        draw_curves(run)
    run = run_with([[1, 2]])
    with pytest.raises(ValueError, match=r"line 1: '\[1, 2\]' is not a JSON object with a step"):
        draw_curves(run)


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no log at .*log\.jsonl"):
        draw_curves(tmp_path)


def test_every_tasks_metric_is_known():
    assert set(MAIN_METRICS) == set(MAIN_METRIC.values())
    lines = [{"step": 1, "pq": 0.5}, {"step": 2}, {"step": 3, "pq": None}]
    steps, values = series(lines, "pq")
    assert steps.tolist() == [1, 3]
    assert np.isnan(values).tolist() == [False, True]


def test_a_run_and_a_resumed_run_draw_all_their_steps(tiny_run, tmp_path, figures):
    train(tiny_run(max_steps=2))
    train(tiny_run(resume=True, max_steps=4))
    assert (tmp_path / "run" / "training_curves.png").is_file()
    steps = [named_lines(figure.axes[0])["loss"].get_xdata().tolist() for figure in figures]
    assert steps == [[1, 2], [1, 2, 3, 4]]
