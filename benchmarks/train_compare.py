"""Ours and what users would train instead, from random weights for the same number of minutes.

    python benchmarks/train_compare.py --data camvid --minutes 30
    python benchmarks/train_compare.py --data nuclei --minutes 30 --only unet:1e-3

All models see the same augmented crops in the same order, each at its own speed, and count the time in which they wait
for data. Peers (`training_peers.py`, `unet_peer.py`) train with AdamW, the polynomial schedule over the time, 50 steps
of warm-up and gradient clipping, once for each learning rate. Every model is measured on the validation split at the
images' original size by our metrics. A run adds its row to benchmarks/results/train_compare_DATA.json when it ends; a
benchmark that is started again leaves out the rows that are there, and goes on with our own unfinished run.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from training_loop import PEER_SETTINGS, train_peer
from training_peers import PEERS, TAKES_OUR_BACKBONE, check_packages
from training_rows import OURS, Row, add_row, commit_of, digest, finished_row, read_rows
from training_table import comparison

from hf_maskformer.presets import PRESETS, preset
from hf_maskformer.training.config import TrainConfig, train_config
from hf_maskformer.training.hardware import hardware
from hf_maskformer.training.setup import OVERRIDES
from hf_maskformer.training.trackers import json_ready, scalars
from hf_maskformer.training.train import train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA_VARIABLE = "HF_MASKFORMER_DATA"
TASKS = {"camvid": "semantic", "nuclei": "instance"}  # of the data sets that are known by name
RECIPES = {"semantic": "camvid.yaml", "instance": "nuclei_instance.yaml"}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
# What may differ between our finished run and the settings of the comparison: where it lies and what it reported.
NOT_COMPARED = {
    "output_dir",
    "dataset",
    "resume",
    "evaluations",
    "eval_limit",
    "eval_batch_size",
    "hub_private",
    "push_to_hub",
    "tracker",
    "log_every",
    "num_samples",
    "checkpoint_every",
    "keep_checkpoints",
}
# Of a run of ours: the same for all rows, and so no setting of ours.
SHARED_SETTINGS = {"max_minutes", "seed", "image_resize"}

Cell = tuple[str, float | None]  # model, learning rate; None: that of our recipe


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    folder = find_data(arguments.data)
    task = arguments.task or TASKS.get(folder.name)
    if task is None:
        raise ValueError(f"--data {folder.name} is none of {', '.join(TASKS)}: say --task {' or '.join(PEERS)}")
    cells = chosen_cells(task, arguments.models, arguments.learning_rates, arguments.only)
    check_packages([model for model, _ in cells])
    recipe = arguments.recipe or ROOT / "recipes" / RECIPES[task]
    flags = {
        "dataset": str(folder),
        "task": task,
        "max_minutes": arguments.minutes,
        "seed": arguments.seed,
        "evaluations": 1,
        **({} if arguments.preset is None else {"preset": arguments.preset}),
    }
    config = train_config(recipe, flags)
    path = arguments.json or RESULTS / f"train_compare_{folder.name}.json"
    for model, rate in cells:
        row = wanted_row(config, Path(recipe).name, model, rate)
        if finished_row(read_rows(path), row) is not None and not arguments.again:
            print(f"{cell_name(model, rate)}: kept from {path}")
            continue
        print(f"{cell_name(model, rate)}: training")
        row.update(measure(config, row, arguments.output_dir, arguments.run), commit=commit_of(ROOT))
        add_row(path, row)
        shown = {name: value for name, value in row.items() if name not in ("conditions", "settings")}
        print(json.dumps(json_ready(shown), indent=2))
    conditions = wanted_row(config, Path(recipe).name, OURS, None)["conditions"]
    print("\n".join(comparison([row for row in read_rows(path) if row["conditions"] == conditions])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="camvid, nuclei, or a folder with a train and a val split")
    parser.add_argument("--minutes", type=float, required=True, help="training time of each run")
    parser.add_argument("--task", choices=list(PEERS), help="default: what is known of the data set")
    parser.add_argument("--models", nargs="+", help="default: all of the task")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=LEARNING_RATES, help="of the peers")
    parser.add_argument("--only", nargs="+", metavar="MODEL[:LR]", help="these runs, such as ours unet:1e-3")
    parser.add_argument("--recipe", type=Path, help="of ours, and the augmentation of all; default: by the task")
    parser.add_argument("--preset", help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "train_compare", help="where our runs go")
    parser.add_argument(
        "--run", type=Path, help="take ours from this finished `hf-maskformer train` run of the recipe"
    )
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/train_compare_DATA.json")
    parser.add_argument("--again", action="store_true", help="run also what has its row already, and replace it")
    return parser.parse_args()


def find_data(name: str) -> Path:
    """The folder `name`, or the one of that name in the folder of real data.

    Raises:
        ValueError: there is neither.
    """
    shared = Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))
    for folder in (Path(name), shared / name):
        if folder.is_dir():
            return folder.resolve()
    raise ValueError(f"--data {name!r}: no such folder, neither here nor in ../shared/data (or ${DATA_VARIABLE})")


def chosen_cells(task: str, models: list[str] | None, rates: list[float], only: list[str] | None) -> list[Cell]:
    """The runs that are asked for: ours once, each peer at every learning rate; or those of `only`.

    Raises:
        ValueError: a model that the task does not have, or a learning rate that is no number greater than 0.
    """
    known = [OURS, *PEERS[task]]
    cells: list[Cell] = []
    for name in only or models or known:
        model, _, rate = name.partition(":")
        if model not in known:
            raise ValueError(f"model {model!r} is not known for task {task!r}; allowed: {', '.join(known)}")
        if rate and (model == OURS or not only):
            raise ValueError(f"{name!r}: a learning rate is only for the peers in --only; ours has its recipe's")
        if model == OURS:
            cells.append((OURS, None))
        else:
            cells += [(model, one) for one in ([checked_rate(rate)] if rate else rates)]
    return cells


def checked_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError as error:
        raise ValueError(f"learning rate {text!r} is no number") from error
    if not 0 < rate < float("inf"):
        raise ValueError(f"learning rate {text!r} must be greater than 0")
    return rate


def cell_name(model: str, rate: float | None) -> str:
    return model if rate is None else f"{model}:{rate:g}"


def wanted_row(config: TrainConfig, recipe: str, model: str, rate: float | None) -> Row:
    """A row without its figures: what was trained, and under which conditions.

    `conditions` are what all rows of one table share. `settings` are the training of this row: of ours the options
    that are not the defaults.
    """
    augmentation = {name: getattr(config, name) for name in ("augmentation", "crop_size", *OVERRIDES)}
    conditions = {
        "data": Path(config.dataset).name,
        "task": config.task,
        "minutes": config.max_minutes,
        "device": hardware(Accelerator(mixed_precision=config.mixed_precision)),
        "batch_size": config.batch_size * config.gradient_accumulation_steps,
        "mixed_precision": config.mixed_precision,
        "canvas": config.config_overrides.get("image_size", preset(config.preset).image_size),
        "augmentation": {name: value for name, value in augmentation.items() if value is not None},
    }
    if config.image_resize != "canvas":
        conditions["image_resize"] = config.image_resize
    backbone = {"backbone": config.preset} if model in TAKES_OUR_BACKBONE else {}
    settings = ours_settings(config) if model == OURS else {**PEER_SETTINGS, **backbone}
    names = {"preset": config.preset, "recipe": recipe} if model == OURS else {}
    if model == OURS or model in TAKES_OUR_BACKBONE:
        settings["preset_fields"] = digest(PRESETS[config.preset].fields)
    rate = config.learning_rate if rate is None else rate
    row = {"model": model, "learning_rate": rate, "seed": config.seed, **names}
    return json_ready({**row, "conditions": conditions, "settings": settings})


def ours_settings(config: TrainConfig) -> dict[str, Any]:
    """The options of our run that are not the defaults and that change what is trained."""
    fields = [field for field in dataclasses.fields(config) if field.name not in NOT_COMPARED | SHARED_SETTINGS]
    return {field.name: getattr(config, field.name) for field in fields if not is_default(field, config)}


def is_default(field: dataclasses.Field, config: TrainConfig) -> bool:
    return getattr(config, field.name) == default_of(field)


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def measure(config: TrainConfig, row: Row, output_dir: Path, run: Path | None) -> Row:
    """Train and evaluate one row; its figures."""
    if row["model"] == OURS:
        config = dataclasses.replace(config, output_dir=str(unfinished_folder(output_dir, row)), resume=True)
        figures = ours_figures(config, run)
    else:
        figures = train_peer(config, row["model"], row["learning_rate"])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**figures, "versions": {**versions, "transformers": transformers.__version__}}


def unfinished_folder(output_dir: Path, row: Row) -> Path:
    """Where our run of a row goes: on with the one that was stopped, and never on with one that ended."""
    known = {key: row[key] for key in ("conditions", "settings")}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    for number in itertools.count(1):
        folder = output_dir / f"{row['conditions']['data']}-{digest}-seed{row['seed']}-{number}"
        if not (folder / "metrics.json").exists():
            break
    return folder


def ours_figures(config: TrainConfig, run: Path | None) -> Row:
    """Train ours, or read a run that was trained with the same settings.

    Raises:
        ValueError: The run was trained with other settings.
    """
    if run is None:
        metrics, folder = train(config), Path(config.output_dir)
    else:
        metrics, folder = json.loads((run / "metrics.json").read_text()), run
        check_same_training(run, config)
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folder / "final")
    return {**scalars(metrics), "parameters": model.num_parameters()}


def check_same_training(run: Path, config: TrainConfig) -> None:
    """ValueError naming an option in which a run differs; one that it did not know yet had its default."""
    used = json.loads((run / "train_config.json").read_text())
    for field in dataclasses.fields(config):
        wanted = json_ready(getattr(config, field.name))
        given = used.get(field.name, json_ready(default_of(field)))
        if field.name not in NOT_COMPARED and given != wanted:
            raise ValueError(f"{run} was trained with {field.name} = {given!r}, wanted is {wanted!r}")


if __name__ == "__main__":
    main()
