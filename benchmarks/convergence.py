"""What makes mask classification start fast from random weights: each measure alone and together, over seeds.

    python benchmarks/convergence.py --data camvid|nuclei [--steps 120] [--seeds 0 1 2] [--variants NAME ...]

Every run takes the same number of optimizer steps, so that its result does not depend on the machine's load; what a
step costs is measured beside it, as CPU time. All runs of a data set share its recipe's images, augmentation, batch
and budget. A run is trained once: its row is added to the JSON as it ends, and a stopped benchmark goes on from there.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training_rows import commit_of, digest, locked, read_rows, replace_rows

from hf_maskformer.presets import PRESETS
from hf_maskformer.training.config import TrainConfig, train_config
from hf_maskformer.training.train import train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = {"camvid": "camvid.yaml", "nuclei": "nuclei_instance.yaml"}
FORMATS = {"camvid": "semantic_maps", "nuclei": "coco_instance"}
SHOWN = {"camvid": ["mean_iou"], "nuclei": ["map", "map_50"]}

# Names of `config_overrides` and, under "train", of training options that a variant changes in the recipe.
PUBLISHED_MATCHING = {"matcher": "hungarian", "matcher_layers": "each"}
LEARNED = {**PUBLISHED_MATCHING, "query_decoder": "standard", "mask_head": "located_dot_product"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "camvid": {
        "recipe": {},
        "bipartite matching, 50 queries": {"matcher": "hungarian", "num_queries": 50},
        "fixed, then bipartite for the second half": {"train": {"bipartite_after": 0.5}},
        "no pixel loss": {"loss_pixel_weight": 0.0},
        "bipartite, 50 queries, no pixel loss": {
            "matcher": "hungarian",
            "num_queries": 50,
            "loss_pixel_weight": 0.0,
        },
        "learning rate 3e-4": {"train": {"learning_rate": 3e-4}},
        "learning rate 3e-3": {"train": {"learning_rate": 3e-3}},
        "initial weights as torch's modules": {"initialization": "torch"},
        "backbone at a tenth of the rate": {"train": {"backbone_learning_rate_multiplier": 0.1}},
    },
    "nuclei": {
        "recipe": {},
        "learned queries, bipartite": LEARNED,
        "learned queries, coordinates left out": {**LEARNED, "mask_head": "dot_product"},
        "queries from pixels, bipartite": {**PUBLISHED_MATCHING, "mask_head": "located_dot_product"},
        "queries from pixels, paraboloid, bipartite": PUBLISHED_MATCHING,
        "without shared assignment": {"matcher_layers": "each"},
        "initial weights as published": {"initialization": "published"},
        "with one-to-many mask losses": {"loss_one_to_many_weight": 1.0},
        "learning rate 3e-4": {"train": {"learning_rate": 3e-4}},
        "learning rate 3e-3": {"train": {"learning_rate": 3e-3}},
    },
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    path = arguments.json or RESULTS / f"convergence_{arguments.data}.json"
    for seed in arguments.seeds:
        for variant in arguments.variants or VARIANTS[arguments.data]:
            config = variant_config(arguments, variant, seed)
            identity = {"variant": variant, "seed": seed, "steps": arguments.steps, "config": config_digest(config)}
            if any(identity.items() <= row.items() for row in read_rows(path)):
                continue
            row = {**identity, **run(config), "commit": commit_of(ROOT)}
            with locked(path.parent):  # several processes may add rows to one file
                kept = [row for row in read_rows(path) if not same_place(row, identity)]
                replace_rows(path, [*kept, row])
            print(table(arguments.data, read_rows(path)))
    print(table(arguments.data, read_rows(path)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, choices=sorted(RECIPES))
    parser.add_argument("--folder", type=Path, help="of the data set; default: ../shared/data beside the repository")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in arguments.variants or ():
        if name not in VARIANTS[arguments.data]:
            parser.error(f"unknown variant {name!r}; there are {', '.join(VARIANTS[arguments.data])}")
    return arguments


def variant_config(arguments: argparse.Namespace, variant: str, seed: int) -> TrainConfig:
    """The recipe with the changes of a variant."""
    changes = dict(VARIANTS[arguments.data][variant])
    options = changes.pop("train", {})
    flags = {
        "dataset": str(arguments.folder or ROOT.parent / "shared" / "data" / arguments.data),
        "format": FORMATS[arguments.data],
        "seed": seed,
        "max_steps": arguments.steps,
        "evaluations": 1,
        "num_samples": 0,
        "num_workers": 0,
        "tracker": None,
        "config_overrides": changes,
        **options,
    }
    return dataclasses.replace(train_config(ROOT / "recipes" / RECIPES[arguments.data], flags), max_minutes=None)


def config_digest(config: TrainConfig) -> str:
    """Of all that decides on the run but where its data lie: a changed recipe, preset or default is another run."""
    options = {name: value for name, value in vars(config).items() if name not in ("dataset", "output_dir")}
    return digest([options, PRESETS[config.preset].fields])


def same_place(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[name] == other[name] for name in ("variant", "seed", "steps"))


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and read what the run reports."""
    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = str(Path(folder) / "run")
        started = time.process_time()
        metrics = train(config)
        seconds = time.process_time() - started
    return {
        **{name: metrics[name] for name in ("mean_iou", "map", "map_50") if name in metrics},
        "training_minutes": metrics["training_minutes"],
        "cpu_seconds_with_evaluation": seconds,
        "hardware": metrics["hardware"],
    }


def table(data: str, rows: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, as Markdown, in the order of `VARIANTS`."""
    names = SHOWN[data]
    lines = [f"| variant | seeds | steps | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for variant in VARIANTS[data]:
        for steps in sorted({row["steps"] for row in rows if row["variant"] == variant}):
            found = [row for row in rows if row["variant"] == variant and row["steps"] == steps]
            cells = [spread([row[name] for row in found]) for name in names]
            lines.append(f"| {variant} | {len(found)} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
