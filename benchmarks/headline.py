"""The figures that the README begins with: one line for each promise, hits and misses, chosen from the results."""

import re
from collections.abc import Callable
from typing import Any

from training_rows import OURS
from training_table import MODEL_NAMES, SHOWN_METRICS, best_group, data_name, grouped, mean_value

Read = Callable[[str], dict[str, Any]]

# Suite and case of benchmarks/speed.py -> what a reader is told.
SPEED = {
    ("forward", "maskformer"): "MaskFormer Swin-T, forward, 512x512",
    ("forward", "mask2former"): "Mask2Former Swin-T, forward, 512x512",
    ("forward", "maskformer, bf16"): "MaskFormer Swin-T, forward in bf16 (peer in float32)",
    ("train-step", "maskformer"): "MaskFormer Swin-T, training step, 384x384",
    ("train-step", "mask2former"): "Mask2Former Swin-T, training step, 384x384",
    ("loss", "loss"): "Mask2Former's loss, 2 images with 12 objects each",
    ("postprocess", "semantic, 1080x1920"): "semantic maps at 1080x1920",
    ("postprocess", "instance, 1080x1920"): "instances at 1080x1920",
    ("postprocess", "panoptic, 1080x1920"): "panoptic segments at 1080x1920",
    ("pipeline", "maskformer"): "`pipeline()`, a 1080p file to its masks, MaskFormer Swin-T",
    ("processor", "instance maps"): "image processor, 8 images with 20 objects each",
    ("processor", "no maps"): "image processor, 8 images alone",
}
# Metric of benchmarks/metrics.py, way and peer -> its name; on images of this kind.
METRICS = {
    ("mean_iou", "maps to result", "evaluate mean_iou"): "mean IoU",
    ("panoptic_quality", "PNG colours to result", "panopticapi single core"): "PQ, from PNG colours in memory,",
    ("panoptic_quality", "PNG files to result", "panopticapi single core"): "PQ, from PNG files,",
    ("average_precision", "dense masks to result", "pycocotools"): "mask AP",
}
MEASURED_ON = re.compile(r"synthetic 1024x1024, 100 instances, \d images$")
REALTIME_LABELS = 150


def trained(tables: list[list[dict[str, Any]]]) -> list[str]:
    """One line for each model of each comparison: `tables` holds rows of the same conditions."""
    lines = [
        "Trained from random weights, one CPU thread, the same minutes, images and augmentation (scores of the "
        "validation split):",
        "",
        "| data | minutes | model | score |",
        "|---|---|---|---|",
    ]
    for rows in tables:
        conditions = rows[-1]["conditions"]
        task = conditions["task"]
        for name, of_model in sorted(grouped(rows).items(), key=lambda item: item[0] != OURS):
            cell = best_group(of_model, task)
            scores = [
                f"{title} {value:.3f}"
                for metric, title in SHOWN_METRICS[task].items()
                if (value := mean_value(cell, metric)) is not None
            ]
            model = f"**`{cell[0]['preset']}`**" if name == OURS else MODEL_NAMES[name]
            lines.append(f"| {data_name(conditions)} | {conditions['minutes']:g} | {model} | {', '.join(scores)} |")
    return lines


def fast(read: Read) -> list[str]:
    """Times as fast as the peer, beside what was aimed at."""
    rows = [*realtime_rows(read("realtime.json")), *speed_rows(read), *metric_rows(read("metrics.json"))]
    quantized = next(row for row in read("export_quantized.json")["rows"] if row["file"] == "int8")
    rows.append(("int8 file in onnxruntime", "its float32 file", quantized["times_as_fast"], quantized["aim"]))
    machines = sorted({read(f"speed_{suite}.json")["hardware"] for suite, _ in SPEED})
    return [
        f"Speed, measured by turns with the peer in one process ({'; '.join(machines)}; metrics and real time may be "
        "of another machine, which their tables name):",
        "",
        "| what | beside | times as fast | aim |",
        "|---|---|---|---|",
        *(f"| {what} | {peer} | {ratio(times)} | {aimed(times, aim)} |" for what, peer, times, aim in rows),
    ]


def realtime_rows(result: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    return [
        (
            f"`{row['preset']}`, pixels of 512x512 to the map of {row['labels']} classes "
            f"({row['ms']['whole']:.0f} ms, {row['parameters'] / 1e6:.1f}M parameters)",
            "SegFormer-B0",
            row["times_as_fast"],
            row["aim"],
        )
        for row in result["rows"]
        if row["labels"] == REALTIME_LABELS and row["aim"] is not None
    ]


def speed_rows(read: Read) -> list[tuple[str, str, float, float | None]]:
    found = []
    for (suite, case), what in SPEED.items():
        rows = read(f"speed_{suite}.json")["rows"]
        row = next(one for one in rows if one["case"] == case and one["side"] == "ours")
        found.append((what, "transformers", row["times_as_fast"], row["aim"]))
    return found


def metric_rows(result: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    found = []
    for key, name in METRICS.items():
        rows = [row for row in result["rows"] if (row["metric"], row["way"], row["peer"]) == key]
        row = next(one for one in rows if MEASURED_ON.match(one["data"]))
        what = f"{name} of images of 1024x1024 with 100 objects"
        found.append((what, row["peer"].split()[0], row["ratio"], result["goals"][row["metric"]]))
    return found


def ratio(times: float) -> str:
    return f"{times:.0f}" if times >= 20 else f"{times:.1f}" if times >= 2 else f"{times:.2f}"


def aimed(times: float, aim: float | None) -> str:
    if aim is None:
        return "-"
    return f"{aim:g}" if times >= aim else f"{aim:g}: missed"
