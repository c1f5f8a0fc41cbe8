"""What a run cost and reached: the facts in metrics.json, and the table that ends `hf-maskformer train`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.trackers import scalars

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; of getrusage's ru_maxrss
NO_SCORE = -1.0  # of a metric that found no truth on the val split
MIB, MIB_IN_GIB = 2**20, 1024
FACTS = (
    *("main_metric", "steps", "training_minutes", "images_per_second", "data_wait_share"),
    *("peak_memory_mib", "peak_memory_of", "best_step", "best_value", "seed"),
)
# File or folder of a run -> what it is.
PARTS = {
    "best": "the weights that were best on the val split",
    "final": "the last weights",
    "metrics.json": "the figures above, and those of each class",
    "log.jsonl": "every logged step",
    "training_curves.png": "the log as curves",
    "samples": "val images with truth and prediction",
    "tracker": "what the tracker wrote",
}


def run_facts(state: TrainState, *, images_per_step: int, device: torch.device) -> dict[str, Any]:
    """Cost of a run so far, as plain numbers.

    `images_per_second` counts the training steps' time only. `data_wait_share` is the part of it, 0 to 1, in which the
    main process waited for its batches; both are None before the first step. The peak memory is of this process since
    it started: "cuda" is what torch allocated on its GPU, "rss" its resident memory, reader processes not counted; it
    is None where the system does not tell (Windows without a GPU).
    """
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss()
    known = state.seconds > 0
    return {
        "steps": state.step,
        "training_minutes": state.seconds / 60.0,
        "images_per_second": state.step * images_per_step / state.seconds if known else None,
        "data_wait_share": state.data_seconds / state.seconds if known else None,
        "peak_memory_mib": None if peak is None else peak / MIB,
        "peak_memory_of": "cuda" if on_gpu else "rss",
    }


def peak_rss() -> int | None:
    """Bytes of the largest resident memory this process has had; None without the Unix module that knows it."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def summary_table(summary: Mapping[str, Any], run: str | Path) -> str:
    """Text table of what `train` returned, and of what lies in the run's folder; what is not known is left out."""
    rows = [*_cost_rows(summary), *_metric_rows(summary)]
    run = Path(run)
    meanings = PARTS if _has_score(summary) else {**PARTS, "best": "weights that no score has chosen"}
    parts = [(str(run / name), meaning) for name, meaning in meanings.items() if (run / name).exists()]
    blocks = [_aligned(rows), _aligned(parts)]
    rule = "-" * max((len(line) for block in blocks for line in block), default=0)
    return "\n".join([rule, *blocks[0], rule, *blocks[1], rule])


def _cost_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{summary['steps']:,}"),
        ("training", f"{summary['training_minutes']:.1f} minutes (without evaluations and checkpoints)"),
    ]
    if summary.get("images_per_second") is not None:
        rows.append(("speed", f"{summary['images_per_second']:.1f} images/s"))
    if summary.get("data_wait_share") is not None:
        rows.append(("waiting for data", f"{100 * summary['data_wait_share']:.1f} % of the training time"))
    if summary.get("peak_memory_mib") is not None:
        where = "on the GPU" if summary["peak_memory_of"] == "cuda" else "of the main process"
        rows.append(("peak memory", f"{summary['peak_memory_mib'] / MIB_IN_GIB:.2f} GiB {where}"))
    return rows


def _metric_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if summary.get("best_step") is not None and _has_score(summary):
        name = summary.get("main_metric") or "metric"
        rows.append((f"best {name}", f"{summary['best_value']:.4f} at step {summary['best_step']:,}"))
    metrics = {name: value for name, value in scalars(dict(summary)).items() if name not in FACTS}
    for name, value in metrics.items():
        rows.append((f"final {name}", "-" if value in (None, NO_SCORE) else _number(value)))
    return rows


def _has_score(summary: Mapping[str, Any]) -> bool:
    return summary.get("best_value") not in (None, NO_SCORE)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name.ljust(width)}  {text}" for name, text in rows]
