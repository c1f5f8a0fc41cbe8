"""Write the figures of benchmarks/results/*.json into README, paper index and model card, between their markers.

    python benchmarks/report.py

No figure in these pages is typed in: each stands in a JSON file that a seeded command of this repository wrote.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Page -> the sections it holds, each between <!-- NAME: begin --> and <!-- NAME: end -->.
PAGES = {
    "README.md": ("figures", "tools"),
    "docs/paper_index.md": ("figures",),
    "model_cards/maskformer-light.md": ("figures",),
}


def main() -> None:
    training = [*quickstart(read("quickstart.json")), "", *comparison(read("train_compare.json"))]
    training += ["", *padding(read("padding.json"))]
    tools = [*metrics(read("metrics.json")), "", *loading(read("batch_memory.json"), read("indexing.json"))]
    sections = {"figures": training, "tools": tools}
    for page, names in PAGES.items():
        text = (ROOT / page).read_text()
        for name in names:
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            section = "\n".join([begin, *sections[name], end])
            text, count = re.subn(f"{begin}.*?{end}", lambda _, new=section: new, text, flags=re.DOTALL)
            if count != 1:
                raise ValueError(f"{page} must hold the markers {begin} and {end} once, found {count}")
        (ROOT / page).write_text(text)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def quickstart(result: dict[str, Any]) -> list[str]:
    conditions = f"{machine(result['machine'])}, seed {result['seed']}"
    return [
        f"`make quickstart` ({conditions}): {result['training_minutes']:.0f} minutes from random weights, "
        f"{result['images']} unseen scenes.",
        "",
        "| mIoU | PQ | PQ things | PQ stuff | mask AP |",
        "|---|---|---|---|---|",
        "| " + " | ".join(f"{result[key]:.3f}" for key in ("mean_iou", "pq", "pq_things", "pq_stuff", "map")) + " |",
    ]


def comparison(result: dict[str, Any]) -> list[str]:
    names = {
        "ours": f"`{result['preset']}`, `recipes/camvid.yaml`",
        "peer": "transformers' MaskFormer, same backbone, AdamW 2e-4",
    }
    rows = [
        f"| {names[row['model']]} | {row['mean_iou']:.3f} | {row['steps']} | {row['parameters'] / 1e6:.1f}M |"
        for row in sorted(result["rows"], key=lambda row: row["model"])
    ]
    conditions = f"`benchmarks/train_compare.py`, {machine(result['machine'])}, seed {result['seed']}"
    return [
        f"CamVid ({conditions}): {result['minutes']:.0f} minutes from random weights on the same augmented images, "
        "validation split at its original size.",
        "",
        "| model | val mIoU | steps | parameters |",
        "|---|---|---|---|",
        *rows,
        *(f"\n`{row['model']}` was measured {row['code']}." for row in result["rows"] if "code" in row),
    ]


def padding(result: dict[str, Any]) -> list[str]:
    tight, *wider = result["rows"]
    parts = [f"{row['mean_iou']:.3f} on {row['height']}x{row['width']}" for row in wider]
    return [
        f"Padding (`benchmarks/padding.py`, the CamVid model, {result['images']} images of unchanged size): "
        f"mIoU {tight['mean_iou']:.3f} on the tight canvas {tight['height']}x{tight['width']}, {', '.join(parts)}."
    ]


SHOWN_METRICS = (
    ("maps to result", "evaluate mean_iou"),
    ("predicted ids to result", "panopticapi single core"),
    ("PNG files to result", "panopticapi single core"),
    ("PNG colours to result", "panopticapi single core"),
    ("dense masks to result", "pycocotools"),
)
# What a way of the benchmark leaves unsaid.
WAY_NAMES = {
    "predicted ids to result": "predicted ids to result (the peer writes and reads PNG)",
    "PNG colours to result": "PNG colours in memory to result",
}


def metrics(result: dict[str, Any]) -> list[str]:
    names = {
        "mean_iou": "mean IoU",
        "panoptic_quality": "PQ",
        "average_precision": "mask AP",
    }
    rows = [
        f"| {names[row['metric']]}, {WAY_NAMES.get(row['way'], row['way'])} | {row['data']} | "
        f"{row['ours_cpu_ms']:.1f} ms | {row['peer']}: {row['peer_cpu_ms']:.0f} ms | "
        f"{row['ratio']:.1f} ({row['ratio_least']:.1f} to {row['ratio_greatest']:.1f}) |"
        for row in result["rows"]
        if (row["way"], row["peer"]) in SHOWN_METRICS and row["data"].endswith("images") and "synth" in row["data"]
    ]
    added = max(row["added_mb"] for row in result["memory"])
    peak = max(row["peak_mb"] for row in result["memory"])
    return [
        f"Metrics (`benchmarks/metrics.py`, {result['machine']['cpu']}, interleaved, CPU time, medians of "
        f"{result['repeats']} rounds; more rows in benchmarks/results/metrics.json):",
        "",
        "| metric | data | ours | peer | times as fast |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "From PNG files both sides mostly wait for the PNG decoder. "
        f"Evaluating {result['memory_images']} images of 1024x1024 with 100 instances each adds at most {added} MB to "
        f"what the imported libraries hold, {peak} MB in all.",
    ]


def loading(batch: dict[str, Any], index: dict[str, Any]) -> list[str]:
    ours = next(row for row in batch["rows"] if row["path"] == "ours")
    peer = next(row for row in batch["rows"] if row["path"] == "maskformer")
    made = next(row for row in index["rows"] if row["images"] == 1000)
    return [
        f"A batch of one {batch['size']}x{batch['size']} image with {batch['instances']} instances "
        f"(`benchmarks/batch_memory.py`) takes {ours['peak_mib']:.0f} MiB at its peak, with transformers' MaskFormer "
        f"processor {peer['peak_mib']:.0f} MiB. {made['images']} COCO images with {made['segments']} annotations "
        f"(`benchmarks/indexing.py`, {index['cores']} CPU core) are indexed in {made['cold_s']:.1f} s and opened "
        f"again in {made['cached_s']:.1f} s.",
    ]


def machine(described: dict[str, Any]) -> str:
    threads = described["threads"]
    return described["device"] if threads == 2 else f"{described['device']}, {threads} thread"


if __name__ == "__main__":
    main()
