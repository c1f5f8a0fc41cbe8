"""RUN/log.jsonl as a picture, RUN/training_curves.png: losses, metric, learning rate, time spent waiting for data."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

LOG_FILE, CURVES_FILE = "log.jsonl", "training_curves.png"
# An evaluation may hold several of them (a panoptic one has a mean IoU too); the first one leads.
MAIN_METRICS = ("pq", "map", "mean_iou")
COLORS = [colormaps["tab10"](index) for index in range(10)]
INK, GREY = "#18181b", "#a1a1aa"
MOST_NAMED_TERMS = 9  # a term of its own colour each; further ones are grey
MOST_NAMED_INSIDE = 6  # curves whose legend has room in the panel
POINTS_SHOWN_AS_DOTS = 40
SMOOTHED_FROM = 60  # points; fewer are drawn as they are
SMOOTHED_FRACTION = 0.02  # of all points on each side go into a smoothed one
LEAST_SIDE = 0.25  # of these are left on each side at the ends
MOST_PALE = 6  # curves that have what was logged behind them; with more of them nothing could be told apart
LOG_SCALE_FROM = 8.0  # largest / smallest loss
STARVED_PERCENT = 10.0  # of a step's time; more and the readers are too slow
DPI = 110

Series = tuple[np.ndarray, np.ndarray]  # (N,) steps and (N,) values


def draw_curves(run: str | Path) -> Path:
    """Draw RUN/training_curves.png from RUN/log.jsonl; returns its path.

    Four panels over the optimizer steps: the loss and its terms, smoothed over 2 % of the points on each side where
    there are many (what was logged is pale behind it, unless there are many terms too); the main metric of each
    evaluation, the best one ringed, those on another number of images apart; the learning rate; the per cent of each
    step spent waiting for data. Values that are not finite leave a gap. A panel without values says so.

    Raises:
        ValueError: there is no log, or a line of it other than a last one cut off by a kill is not a JSON object.
    """
    run = Path(run)
    lines = read_log(run / LOG_FILE)
    training = [line for line in lines if line.get("event") is None]
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    figure = Figure(figsize=(12, 7.2), dpi=DPI, layout="constrained")
    losses, metric, rate, waiting = figure.subplots(2, 2).ravel()
    _draw_losses(losses, training)
    _draw_metric(metric, evaluations)
    _draw_rate(rate, training)
    _draw_waiting(waiting, training)
    last = max((line["step"] for line in lines), default=1)
    for axes in (losses, metric, rate, waiting):
        _finish(axes, last)
    figure.suptitle(run.resolve().name, fontsize=12, color=INK, x=0.012, ha="left", fontweight="bold")
    picture = BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    path = run / CURVES_FILE
    path.write_bytes(picture.getvalue())
    return path


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines in the order of their steps; a last line that a kill cut off is left out."""
    if not path.is_file():
        raise ValueError(f"there is no log at {path}; it must be the log.jsonl of a training run")
    texts = path.read_text().splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                continue
            raise ValueError(f"{path}, line {number}: {text[:60]!r} is not a JSON object") from error
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f"{path}, line {number}: {text[:60]!r} is not a JSON object with a step")
        lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def series(lines: list[dict[str, Any]], name: str) -> Series:
    """Steps and values of the lines that hold `name`; None and infinities are nan."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps = np.array([step for step, _ in found], dtype=np.float64)
    values = np.array([np.nan if value is None else value for _, value in found], dtype=np.float64)
    return steps, np.where(np.isfinite(values), values, np.nan)


def smoothed(values: np.ndarray) -> np.ndarray:
    """(N,) means over a window around each value, nan left out.

    Towards both ends the window shrinks, the same on both sides, to `LEAST_SIDE` of its size: a steep start stays
    steep, and the last points are still means.
    """
    radius = max(1, round(len(values) * SMOOTHED_FRACTION))
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    reach = np.clip(np.minimum(at, len(values) - 1 - at), round(radius * LEAST_SIDE), radius)
    first, end = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    number = counts[end] - counts[first]
    return np.where(known, (sums[end] - sums[first]) / np.maximum(number, 1), np.nan)


def is_term(name: str) -> bool:
    """A loss term over all layers; TERM/layer_N is the share of one, which would be too many curves."""
    return name.startswith("loss_") and "/" not in name


def _draw_losses(axes: Any, training: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in training for name in line if is_term(name)))
    further = names[MOST_NAMED_TERMS:]
    pale = len(names) < MOST_PALE
    for position, name in enumerate(further):
        label = f"{len(further)} more terms" if position == 0 else None
        _draw_line(axes, series(training, name), GREY, label, width=0.7, pale=False)
    for name, color in zip(names[:MOST_NAMED_TERMS], COLORS[1:], strict=False):
        _draw_line(axes, series(training, name), color, name.removeprefix("loss_"), width=1.2, pale=pale)
    total = series(training, "loss")
    if len(total[0]):
        _draw_line(axes, total, INK, "loss", width=1.8)
    shown = [series(training, name)[1] for name in ("loss", *names)]
    values = np.concatenate(shown) if shown else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("loss (weighted sum) and its terms (unweighted)" if names else "loss")


def _draw_metric(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    name = next((name for name in MAIN_METRICS if any(name in line for line in evaluations)), None)
    axes.set_title(name or "metric")
    if name is None:
        return
    images = list(dict.fromkeys(line.get("images") for line in evaluations))
    for position, count in enumerate(images):
        steps, values = series([line for line in evaluations if line.get("images") == count], name)
        label = None if count is None else f"on {count:,} images"
        color = COLORS[position % len(COLORS)]
        axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
        if position == 0 and np.isfinite(values).any():
            best = int(np.nanargmax(values))
            axes.plot(steps[best], values[best], "o", color=color, markersize=11, markerfacecolor="none")
            axes.set_title(f"{name}: best {values[best]:.4f} at step {steps[best]:,.0f}")
    values = series(evaluations, name)[1]
    highest = np.nanmax(values) if np.isfinite(values).any() else 0.0
    axes.set_ylim(0, 1.25 * highest if highest > 0 else 1.0)


def _draw_rate(axes: Any, training: list[dict[str, Any]]) -> None:
    axes.set_title("learning rate")
    rate = series(training, "learning_rate")
    if len(rate[0]):
        _draw_line(axes, rate, COLORS[0], None, width=1.5, smooth=False)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)


def _draw_waiting(axes: Any, training: list[dict[str, Any]]) -> None:
    axes.set_title("time waiting for data, % of a step")
    timed = [line for line in training if line.get("seconds_per_step") and "data_seconds" in line]
    steps, data = series(timed, "data_seconds")
    _, whole = series(timed, "seconds_per_step")
    if not len(steps):
        return
    share = 100 * data / whole
    _draw_line(axes, (steps, share), COLORS[0], None, width=1.5)
    axes.axhline(STARVED_PERCENT, color="#b91c1c", linewidth=0.9, linestyle="--", label="10 %: the readers are slow")
    highest = np.nanmax(share) if np.isfinite(share).any() else 0.0
    axes.set_ylim(0, min(100.0, max(2 * STARVED_PERCENT, 1.1 * highest)))


def _draw_line(
    axes: Any, line: Series, color: Any, label: str | None, *, width: float, smooth: bool = True, pale: bool = True
) -> None:
    """A curve; few points have dots, many are smoothed and, if `pale`, have what was logged behind them."""
    steps, values = line
    if len(steps) < SMOOTHED_FROM or not smooth:
        marker = "o" if len(steps) <= POINTS_SHOWN_AS_DOTS else None
        axes.plot(steps, values, color=color, linewidth=width, marker=marker, markersize=3, label=label)
        return
    if pale:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.2)
    axes.plot(steps, smoothed(values), color=color, linewidth=width, label=label)


def _finish(axes: Any, last_step: float) -> None:
    """What all panels share: the same steps, a light grid, a legend where something has a name."""
    axes.set_xlim(0, max(last_step, 1) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.title.set(fontsize=10, color=INK)
    axes.title.set_horizontalalignment("center")
    axes.tick_params(labelsize=8, colors="#52525b")
    axes.grid(color="#e4e4e7", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
    elif axes.get_legend_handles_labels()[1]:
        # Beside the panel where there is much to name: inside it would lie on the curves.
        many = len(axes.get_legend_handles_labels()[1]) > MOST_NAMED_INSIDE
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {"ncols": 2}
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", **beside)
