"""What a run's folder says about its model, without anything that belongs to the machine it was trained on."""

import json
import re
import shlex
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open

CONFIG_FILE = "train_config.json"
METRICS_FILE = "metrics.json"
MODEL_FOLDER = "best"
# Metric -> title; the first one of a task is the one that `best/` was chosen by.
TASK_METRICS = {
    "semantic": {"mean_iou": "mIoU", "overall_accuracy": "pixel accuracy", "mean_accuracy": "mean class accuracy"},
    "instance": {"map": "mask AP", "map_50": "mask AP50", "map_75": "mask AP75"},
    "panoptic": {"pq": "PQ", "sq": "SQ", "rq": "RQ", "mean_iou": "mIoU", "map": "mask AP of things"},
}
OPTIONS_OF_THIS_MACHINE = {"cache_dir"}
# Who follows a published recipe must not publish to the repository it came from.
FIELDS_OF_THIS_MACHINE = {"output_dir", "resume", "push_to_hub", "hub_private"}
# The reader's options that the evaluation split does not take over from the training split.
OPTIONS_OF_ONE_SPLIT = {"length", "seed", "image_size", "streaming", "shuffle_buffer"}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: stored, not learned
BUILT_IN_DATASET = "scenes"  # drawn on the fly, without any files
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOCAL_PATH = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]")  # the beginning of one


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its options, its metrics and the configuration of the model in `best/`.

    `options` holds the training options with every local path cut down to its last part, and without the fields that
    only mean something where the run was made; `dataset_id` is None unless the data lies on the Hub.
    """

    options: dict[str, Any]
    metrics: dict[str, Any]
    model: dict[str, Any]
    num_parameters: int
    dataset: str
    dataset_id: str | None
    base_model_id: str | None

    @property
    def task(self) -> str:
        return str(self.model["task"])

    @property
    def dataset_is_a_folder(self) -> bool:
        """Whether `dataset` is the last part of a local path, so that a reader has to name their own."""
        return self.dataset_id is None and self.dataset != BUILT_IN_DATASET

    @property
    def labels(self) -> dict[int, str]:
        return {int(label): str(name) for label, name in sorted(self.model["id2label"].items(), key=_label_of)}

    @property
    def things(self) -> set[int]:
        return {int(label) for label in self.model.get("thing_label_ids") or ()}

    @property
    def measured_on_all_images(self) -> bool:
        """Whether metrics.json, which holds the numbers of the run's last weights, speaks of those in `best/`."""
        return self.metrics.get("best_step") is not None and self.metrics["best_step"] == self.metrics.get("steps")

    @property
    def results(self) -> dict[str, float]:
        """Title -> value of the model in `best/`.

        Where a step before the last one was best, only the metric it was chosen by is known, on the images of every
        evaluation (`eval_limit`). Empty for a run without evaluation; a metric that is not finite is left out.
        """
        titles = TASK_METRICS[self.task]
        main = next(iter(titles))
        known = self.metrics if self.measured_on_all_images else {main: self.metrics.get("best_value")}
        numbers = {titles[name]: known.get(name) for name in titles}
        return {title: float(value) for title, value in numbers.items() if _is_score(value)}

    @property
    def class_results(self) -> list[float | None]:
        """The task's main metric of every class (IoU, AP, PQ), None for a class that was absent; [] if not known."""
        values = self.metrics.get("per_category_iou" if self.task == "semantic" else "per_category")
        if not self.measured_on_all_images or not isinstance(values, list) or len(values) != len(self.labels):
            return []
        numbers = [value.get("pq") if isinstance(value, dict) else value for value in values]
        return [float(value) if _is_score(value) else None for value in numbers]

    @property
    def image_limit(self) -> int | None:
        """The images behind `results`: the first so many of the split, or None for all."""
        return None if self.measured_on_all_images else self.options.get("eval_limit")

    @property
    def evaluation_options(self) -> dict[str, Any]:
        """Options that the evaluation split was read with."""
        shared = self.options.get("dataset_options") or {}
        own = self.options.get("val_dataset_options") or {}
        return {**{name: value for name, value in shared.items() if name not in OPTIONS_OF_ONE_SPLIT}, **own}

    def evaluation_command(self, repo_id: str) -> str:
        """The command that measures `results` again."""
        words = ["hf-maskformer", "evaluate", repo_id, "--dataset", self.dataset]
        words += ["--split", str(self.options["val_split"])]
        if self.options.get("format") is not None:
            words += ["--format", self.options["format"]]
        if self.evaluation_options:
            pairs = [f"{name}={_yaml_text(value)}" for name, value in self.evaluation_options.items()]
            words += ["--dataset-options", *pairs]
        if self.image_limit is not None:
            words += ["--limit", str(self.image_limit)]
        return shlex.join(words)


def read_run(run: str | Path) -> RunRecord:
    """The record of a run's folder.

    Raises:
        ValueError: the folder, a JSON file of the run, or the model in `best/` is missing or damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"run {run} does not exist; give the output_dir of a training run")
    options = _read_json(folder / CONFIG_FILE)
    if not (folder / MODEL_FOLDER / "config.json").is_file():
        raise ValueError(f"run {run} holds no model in {MODEL_FOLDER}/; it is written by the first evaluation")
    metrics = _read_json(folder / METRICS_FILE)
    model = _read_json(folder / MODEL_FOLDER / "config.json")
    if model.get("task") not in TASK_METRICS:
        raise ValueError(
            f"{folder / MODEL_FOLDER / 'config.json'}: task is {model.get('task')!r}; allowed: {list(TASK_METRICS)}"
        )
    dataset, start = str(options["dataset"]), options.get("init_from")
    return RunRecord(
        options=public_options(options),
        metrics=metrics,
        model=model,
        num_parameters=count_parameters(folder / MODEL_FOLDER),
        dataset=public_name(dataset),
        dataset_id=dataset if _is_hub_id(dataset) else None,
        base_model_id=start if start is not None and _is_hub_id(start) else None,
    )


def public_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run as a recipe that may be shown to everybody.

    Local paths become their last part; where the run was written and where the machine keeps its caches is left out.
    """
    shown = {name: value for name, value in options.items() if name not in FIELDS_OF_THIS_MACHINE}
    for name in ("dataset", "init_from"):
        if shown.get(name) is not None:
            shown[name] = public_name(str(shown[name]))
    return {name: _public_value(value) for name, value in shown.items()}


def public_name(source: str) -> str:
    """A Hub id as it is; of a local path the last part.

    `owner/name` is taken for a path where such a folder exists below the working directory.
    """
    return source if _is_hub_id(source) else _last_part(str(Path(source).expanduser()))


def count_parameters(folder: Path) -> int:
    """Numbers in the weights of a saved model, the statistics of batch norms left out.

    Raises:
        ValueError: no safetensors file, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors weights")
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                names = [name for name in weights.keys() if not name.endswith(STATISTICS)]  # noqa: SIM118
                total += sum(prod(weights.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return total


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no finished training run: it holds no {path.name}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object")
    return values


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public_value(item) for key, item in value.items() if key not in OPTIONS_OF_THIS_MACHINE}
    if isinstance(value, (list, tuple)):
        return [_public_value(item) for item in value]
    if isinstance(value, str) and LOCAL_PATH.match(value):
        return _last_part(value)
    return value


def _last_part(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name or path


def _is_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def _is_score(value: Any) -> TypeGuard[float]:
    """A share of 0 to 1: -1, null and nan stand for a metric with nothing to average over."""
    return isinstance(value, (int, float)) and isfinite(value) and value >= 0


def _label_of(item: tuple[str, str]) -> int:
    return int(item[0])


def _yaml_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
