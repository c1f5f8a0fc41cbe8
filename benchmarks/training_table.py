"""The training comparison as text for a page: each model at its best learning rate, then all rates.

A row is what `benchmarks/train_compare.py` measured; where there are rows of several conditions (minutes, machine,
augmentation), those of the last one are shown. Several seeds of one model and learning rate are averaged.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from training_rows import OURS

Row = dict[str, Any]
MAIN_METRIC = {"semantic": "mean_iou", "instance": "map_50"}  # that chooses the learning rate
SHOWN_METRICS = {
    "semantic": {"mean_iou": "mIoU", "overall_accuracy": "pixel accuracy"},
    "instance": {"map": "mask AP", "map_50": "AP50"},
}
MODEL_NAMES = {
    "segformer": "transformers' SegFormer-B0",
    "maskformer": "transformers' MaskFormer, backbone of ours",
    "mask2former": "transformers' Mask2Former, backbone of ours",
    "unet": "MONAI's UNet, three classes, connected components",
}


def comparison(rows: Sequence[Row], latencies: Mapping[str, float] | None = None) -> list[str]:
    """Markdown lines; ours first, the peers by falling metric. None without rows.

    `latencies`: milliseconds from an image of 512x512 to its map, by preset or peer; a column where ours is known.
    """
    if not rows:
        return []
    conditions = rows[-1]["conditions"]
    groups = grouped([row for row in rows if row["conditions"] == conditions])
    task = conditions["task"]
    best = sorted((best_group(of_model, task) for of_model in groups.values()), key=lambda cell: order(cell, task))
    metrics = SHOWN_METRICS[task]
    titles = ["model", *(f"val {title}" for title in metrics.values()), "learning rate"]
    titles += ["steps", "images/s", "waiting for data", "parameters"]
    known = [(latencies or {}).get(cell[0].get("preset") or cell[0]["model"]) for cell in best]
    extra = [[] for _ in best] if known[0] is None else [["-" if ms is None else f"{ms:.0f}"] for ms in known]
    if known[0] is not None:
        titles.append("ms at 512x512 (`benchmarks/realtime.py`)")
    return [
        introduction(conditions, rows),
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
        *(table_line(cell, list(metrics), more) for cell, more in zip(best, extra, strict=True)),
        "",
        *rates(groups, task),
    ]


def grouped(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """Model -> learning rate -> one row for each seed."""
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["model"], {}).setdefault(row["learning_rate"], []).append(row)
    return groups


def mean_value(cell: Sequence[Row], name: str) -> float | None:
    """Mean over the seeds; None if any of them diverged, or has no such figure."""
    values = [row.get(name) for row in cell]
    return None if any(value is None for value in values) else fmean(values)


def best_group(of_model: dict[float, list[Row]], task: str) -> list[Row]:
    return max(of_model.values(), key=lambda cell: ranked(mean_value(cell, MAIN_METRIC[task])))


def order(cell: Sequence[Row], task: str) -> tuple[bool, float]:
    return cell[0]["model"] != OURS, -ranked(mean_value(cell, MAIN_METRIC[task]))


def ranked(value: float | None) -> float:
    return -1.0 if value is None else value


def table_line(cell: Sequence[Row], metrics: Sequence[str], more: Sequence[str] = ()) -> str:
    values = [number(mean_value(cell, name)) for name in metrics]
    first = cell[0]
    name = MODEL_NAMES.get(first["model"], f"ours: `{first.get('preset')}`, `recipes/{first.get('recipe')}`")
    share = mean_value(cell, "data_wait_share")
    speed = mean_value(cell, "images_per_second")
    parts = [
        name,
        *values,
        f"{first['learning_rate']:g}",
        f"{fmean(row['steps'] for row in cell):.0f}",
        "-" if speed is None else f"{speed:.1f}",
        "-" if share is None else f"{100 * share:.0f} %",
        f"{first['parameters'] / 1e6:.1f}M",
        *more,
    ]
    return f"| {' | '.join(parts)} |"


def number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def introduction(conditions: Row, rows: Sequence[Row]) -> str:
    seeds = sorted({row["seed"] for row in rows if row["conditions"] == conditions})
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of the seeds {', '.join(map(str, seeds))}"
    minutes = f"{conditions['minutes']:g}"
    command = f"`benchmarks/train_compare.py --data {conditions['data']} --minutes {minutes}`"
    return (
        f"{data_name(conditions)} ({command}, {conditions['device']}, {named}): {minutes} minutes of training each, "
        "waiting for data included, from random weights on the same augmented images; validation split at its "
        "original size. The learning rate of a peer, and where it can take images of any size the size it sees, are "
        "the best on this same split."
    )


def data_name(conditions: Row) -> str:
    """The data set, and how its images are resized where that is not to fit inside the canvas."""
    if conditions.get("image_resize") != "shortest_edge":
        return str(conditions["data"])
    return f"{conditions['data']}, shorter side {min(conditions['canvas'])}"


def rates(groups: dict[str, dict[float, list[Row]]], task: str) -> list[str]:
    """One line: the main metric of each peer at every learning rate."""
    parts = []
    for model, of_model in groups.items():
        if model == OURS:
            continue
        values = [
            f"{number(mean_value(cell, MAIN_METRIC[task]))} at {rate:g}" for rate, cell in sorted(of_model.items())
        ]
        parts.append(f"{MODEL_NAMES.get(model, model)}: {', '.join(values)}")
    title = SHOWN_METRICS[task][MAIN_METRIC[task]]
    return [f"{title} at every learning rate. {'; '.join(parts)}."] if parts else []
