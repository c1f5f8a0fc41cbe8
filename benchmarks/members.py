"""Members of the family side by side: the same drawn scenes, backbone, widths and minutes, from random weights.

    python benchmarks/members.py --minutes 6 [--seed 0] [--only mask2former-light]

Each member is trained with one recipe (AdamW, 1e-3, polynomial) and measured on unseen scenes. A row is added to
benchmarks/results/members.json when its run ends; a benchmark that is started again keeps the rows that are there.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from training_rows import commit_of, digest, locked, read_rows, replace_rows

from hf_maskformer.data.load import load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.presets import PRESETS
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.train import train

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = ("maskformer-light", "mask2former-light", "panoptic-segformer-light", "maskformer-light-anchored")
SCENE, NUM_QUERIES, NUM_SCENES = 128, 40, 100
POINTS = (SCENE // 4) ** 2 // 2  # of a loss on points: half as many as a mask has cells (published: a fifth)
SHOWN = ("pq", "pq_things", "pq_stuff", "map", "mean_iou")


def main() -> None:
    arguments = parse_arguments()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or MEMBERS:
        row = {
            "model": name,
            "minutes": arguments.minutes,
            "seed": arguments.seed,
            "threads": arguments.threads,
            "preset_fields": digest(PRESETS[name].fields),
        }
        if any(row.items() <= old.items() for old in read_rows(arguments.json)):
            print(f"{name}: kept from {arguments.json}")
            continue
        row |= {**measure(name, arguments.minutes, arguments.seed), "commit": commit_of(ROOT)}
        with locked(arguments.json.parent):  # several processes may add rows to one file
            kept = [old for old in read_rows(arguments.json) if not same_place(old, row)]
            replace_rows(arguments.json, [*kept, row])
        print(table(read_rows(arguments.json)))
    print(table(read_rows(arguments.json)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="training time of each member")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=MEMBERS)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "members.json")
    return parser.parse_args()


def same_place(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[name] == other[name] for name in ("model", "minutes", "seed", "threads"))


def measure(name: str, minutes: float, seed: int) -> dict[str, Any]:
    """Train one member and evaluate it on scenes that no one trains on."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        trained = train(
            TrainConfig(
                preset=name,
                dataset="scenes",
                task="panoptic",
                output_dir=str(output),
                config_overrides={
                    "image_size": [SCENE, SCENE],
                    "num_queries": NUM_QUERIES,
                    "criterion_points": POINTS,
                },
                dataset_options={"length": 2000, "image_size": SCENE},
                val_dataset_options={"length": 50, "image_size": SCENE},
                max_minutes=minutes,
                seed=seed,
                learning_rate=1e-3,
                backbone_learning_rate_multiplier=1.0,
                weight_decay=0.01,
                warmup_steps=50,
                max_grad_norm=1.0,
                scale_range=(0.8, 1.25),
                evaluations=1,
                num_samples=0,
                tracker=None,
            )
        )
        model, processor = load_checkpoint(output / "final")
        unseen = load("scenes", split="test", task="panoptic", length=NUM_SCENES, image_size=SCENE)
        metrics = evaluate(model, processor, unseen)
    facts = {key: trained[key] for key in ("steps", "training_minutes", "hardware")}
    return {**{key: metrics[key] for key in SHOWN}, **facts, "parameters": model.num_parameters()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a member, in the order of `MEMBERS`."""
    lines = [f"| model | parameters | minutes | steps | {' | '.join(SHOWN)} |", "|---" * (4 + len(SHOWN)) + "|"]
    for row in sorted(rows, key=lambda row: MEMBERS.index(row["model"])):
        figures = " | ".join(f"{row[name]:.3f}" for name in SHOWN)
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['minutes']:g} | {row['steps']} | {figures} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
