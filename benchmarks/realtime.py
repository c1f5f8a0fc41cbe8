"""Beside transformers' SegFormer-B0: from the pixels of one image to its map of classes, on a CPU.

    python benchmarks/realtime.py [--presets lite-mobilenetv3-small ...] [--labels 11 150] [--size 512] [--threads 1]

Both sides start from the same normalised tensor (1, 3, SIZE, SIZE) and end with the map of classes at SIZE x SIZE that
their own image processor's `post_process_semantic_segmentation` makes; weights are random, classes are as many on both
sides. Ours runs after `optimize_for_inference()` (and once more as it was trained), with one query for each class as
in the semantic recipes, or the preset's number where there are more classes. All sides take turns in one process, and
a figure is the median of the process's CPU time, which other work on the machine disturbs least.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import machine
from training_rows import commit_of
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, list_presets, preset

ROOT = Path(__file__).resolve().parent.parent
PEER = "segformer-b0"
AIMS = {"lite-mobilenetv3-small": 2.5, "lite-mobilenetv4-small": 1.5}
MILLISECONDS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lite = [name for name in list_presets() if name.startswith("lite-")]
    parser.add_argument("--presets", nargs="+", default=lite, choices=list_presets())
    parser.add_argument("--labels", nargs="+", type=int, default=[11, 150])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/realtime.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for labels in arguments.labels for row in measured(labels, arguments)]
    report = {
        "size": arguments.size,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "hardware": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit_of(ROOT),
        "rows": rows,
    }
    print(table(rows))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(labels: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each preset, with the peer's figures of the same turns."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, arguments.size, arguments.size)
    sides = {PEER: peer(labels)}
    for name in arguments.presets:
        model, finish = ours(name, labels)
        sides[f"{name}, as trained"] = (model, finish)
        sides[name] = (copy.deepcopy(model).optimize_for_inference(), finish)
    seconds = timed(sides, images, arguments)
    parameters = {name: sum(value.numel() for value in model.parameters()) for name, (model, _) in sides.items()}
    rows = []
    for name in arguments.presets:
        row = {"preset": name, "labels": labels, "parameters": parameters[f"{name}, as trained"]}
        row |= {"peer_parameters": parameters[PEER], "ms": seconds[name], "peer_ms": seconds[PEER]}
        row |= {"as_trained_ms": seconds[f"{name}, as trained"], "aim": AIMS.get(name)}
        row["times_as_fast"] = seconds[PEER]["whole"] / seconds[name]["whole"]
        rows.append(row)
    return rows


def ours(name: str, labels: int) -> tuple[Any, Callable[..., Any]]:
    fields: dict[str, Any] = {"num_labels": labels, "task": "semantic"}
    if labels < preset(name).num_queries:
        fields |= {"num_queries": labels, "matcher": "fixed"}
    config = preset(name, **fields)
    processor = image_processor_for(config)
    return HfMaskFormerForUniversalSegmentation(config).eval(), processor.post_process_semantic_segmentation


def peer(labels: int) -> tuple[Any, Callable[..., Any]]:
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=labels)).eval()  # the defaults are B0's
    return model, SegformerImageProcessor().post_process_semantic_segmentation


def timed(
    sides: dict[str, tuple[Any, Callable[..., Any]]], images: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Milliseconds of each side: the model, the map of classes, and both; every second round goes backwards."""
    size = (arguments.size, arguments.size)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(arguments.warm_up + arguments.repeats):
        for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            model, finish = sides[name]
            with torch.inference_mode():
                started = time.process_time()
                outputs = model(pixel_values=images)
                predicted = time.process_time()
                found = finish(outputs, target_sizes=[size])
                done = time.process_time()
            if found[0].shape != size:
                raise SystemExit(f"{name} gave a map of {tuple(found[0].shape)}")
            if turn >= arguments.warm_up:
                taken[name].append(((predicted - started) * MILLISECONDS, (done - predicted) * MILLISECONDS))
    return {
        name: {
            "model": statistics.median(model for model, _ in pairs),
            "map": statistics.median(finish for _, finish in pairs),
            "whole": statistics.median(model + finish for model, finish in pairs),
        }
        for name, pairs in taken.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| preset | classes | parameters | model ms | map ms | whole ms | as trained ms | SegFormer-B0 (model, map) "
        "| times as fast | aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours_ms, peer_ms = row["ms"], row["peer_ms"]
        lines.append(
            f"| {row['preset']} | {row['labels']} | {row['parameters'] / 1e6:.2f}M | {ours_ms['model']:.0f} | "
            f"{ours_ms['map']:.0f} | {ours_ms['whole']:.0f} | {row['as_trained_ms']['whole']:.0f} | "
            f"{peer_ms['whole']:.0f} ({peer_ms['model']:.0f}, {peer_ms['map']:.0f}) | {row['times_as_fast']:.1f} | "
            f"{row['aim'] or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
