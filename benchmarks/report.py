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
PAGES = ("README.md", "docs/paper_index.md", "model_cards/maskformer-light.md")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> None:
    lines = [*quickstart(read("quickstart.json")), "", *comparison(read("train_compare.json"))]
    lines += ["", *padding(read("padding.json"))]
    figures = "\n".join([BEGIN, *lines, END])
    for page in PAGES:
        text = (ROOT / page).read_text()
        replaced, count = re.subn(f"{BEGIN}.*?{END}", lambda _: figures, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} must hold the markers {BEGIN} and {END} once, found {count}")
        (ROOT / page).write_text(replaced)


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


def machine(described: dict[str, Any]) -> str:
    threads = described["threads"]
    return described["device"] if threads == 2 else f"{described['device']}, {threads} thread"


if __name__ == "__main__":
    main()
