"""Smaller forms of an exported model: how much faster and smaller they are, and what they lose on a data set.

    python benchmarks/export_quantized.py CHECKPOINT --dataset DIR [--variants int8 int8-dynamic] [--limit 50]

CHECKPOINT is exported, int8 is calibrated on images of the train split, and every file is measured on the val split.
Times are of one image of the model's canvas in onnxruntime, the files by turns, medians of the process's CPU time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from training_rows import commit_of

from hf_maskformer.data.load import load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.export import export_model
from hf_maskformer.export.examples import example_inputs
from hf_maskformer.inference.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
AIMS = {"int8": 1.3}  # times as fast as float32
MOST_LOSS = 0.01  # of the metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--name", default="the model", help="of the checkpoint, for the pages")
    parser.add_argument("--variants", nargs="+", default=["int8", "int8-dynamic"])
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/export_quantized.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_checkpoint(arguments.checkpoint)
    data = {split: load(arguments.dataset, split=split, task=processor.task) for split in ("train", "val")}
    with tempfile.TemporaryDirectory() as folder:
        exported = export_model(
            model,
            processor,
            folder,
            variants=arguments.variants,
            data=data["val"],
            calibration_data=data["train"],
            calibration_images=arguments.calibration_images,
        )
        rows = measured(exported, processor, data["val"], arguments)
    report = {
        "model": arguments.name,
        "data": Path(arguments.dataset).name,
        "canvas": exported.record["image_size"],
        "calibration_images": arguments.calibration_images,
        "limit": arguments.limit,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "hardware": machine(),
        "commit": commit_of(ROOT),
        "allowed_loss": MOST_LOSS,
        "rows": rows,
    }
    print(table(rows))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(exported: Any, processor: Any, data: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    metric = {"semantic": "mean_iou", "instance": "map", "panoptic": "pq"}[data.task]
    models = {name: load_checkpoint(path)[0] for name, path in exported.files.items()}
    image = {name: value[:1] for name, value in example_inputs(processor, data).items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.warm_up + arguments.repeats):
        for name in list(models) if turn % 2 == 0 else reversed(list(models)):
            started = time.process_time()
            models[name](**image)
            if turn >= arguments.warm_up:
                taken[name].append((time.process_time() - started) * 1000)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        scores = evaluate(model, processor, data, limit=arguments.limit)
        row = {"file": name, "megabytes": exported.record["megabytes"][name], "ms": statistics.median(taken[name])}
        row |= {"metric": metric, "score": scores[metric], "aim": AIMS.get(name)}
        first = rows[0] if rows else row
        row |= {"times_as_fast": first["ms"] / row["ms"], "loss": first["score"] - row["score"]}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| file | MB | ms | times as fast | aim | {rows[0]['metric']} | loss (at most {MOST_LOSS} is wanted) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['file']} | {row['megabytes']:.1f} | {row['ms']:.1f} | {row['times_as_fast']:.2f} | "
            f"{row['aim'] or '-'} | {row['score']:.4f} | {row['loss']:+.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
