"""Where the numbers of a run go: one JSON object per line in log.jsonl, a progress bar, and a tracker."""

import json
import math
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from tqdm.auto import tqdm

from hf_maskformer.evaluation.json_format import json_ready
from hf_maskformer.training.checkpoint import write_text

PROJECT = "hf_maskformer"  # under which a tracker files its runs
TRACKER_FOLDER = "tracker"  # of a run; what trackers that write local files write there


class JsonlLog:
    """Append-only log; a resumed run first drops the lines of steps and evaluations it will do again."""

    def __init__(self, path: Path, *, resume_step: int = 0, evaluated_step: int = 0) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        last = {"evaluation": evaluated_step}
        kept = [line for line in lines if 0 < step_of(line) <= last.get(event_of(line) or "", resume_step)]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """One line; what is nan or infinite, as the norm of a step that the fp16 scaler passed over, is null."""
        with self.path.open("a") as file:
            file.write(json.dumps(json_ready(values), allow_nan=False) + "\n")


def step_of(line: str) -> float:
    """The step of a log line; a line cut off by a kill counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def event_of(line: str) -> str | None:
    """What a log line is about; None for a training step, and for a line cut off by a kill."""
    try:
        return json.loads(line).get("event")
    except json.JSONDecodeError:
        return None


class RunningMean:
    """Means of named values since the last `pop`."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def pop(self) -> dict[str, float]:
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


class ProgressBar:
    """tqdm over the budget in per cent, because under a budget in minutes the number of steps is unknown."""

    def __init__(self, *, enabled: bool) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100.0, desc="train", bar_format=layout, disable=not enabled, mininterval=1.0)

    def show(self, progress: float, **values: str) -> None:
        self.bar.set_postfix(values, refresh=False)
        self.bar.update(100.0 * min(progress, 1.0) - self.bar.n)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()  # an error's message begins on a line of its own


def scalars(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The single numbers of a metrics dict, JSON-ready."""
    ready = {name: json_ready(value) for name, value in metrics.items()}
    return {name: value for name, value in ready.items() if value is None or isinstance(value, (int, float))}


def tracker_options(tracker: str | None, run: Path) -> dict[str, Any]:
    """What `Accelerator` is given so that it feeds `tracker`; nothing for None.

    Raises:
        ValueError: Accelerate does not know the tracker, or its package is not installed.
    """
    if tracker is None:
        return {}
    known = sorted(kind.value for kind in LoggerType if kind != LoggerType.ALL)
    if tracker not in known:
        raise ValueError(
            f"tracker is {tracker!r}; Accelerate {accelerate.__version__} has {', '.join(known)}, or none"
        )
    if LoggerType(tracker) not in get_available_trackers():
        raise ValueError(f"tracker is {tracker!r}, but its package is not installed: pip install {tracker}")
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / TRACKER_FOLDER))
    return {"log_with": tracker, "project_config": project}


def start_tracker(accelerator: Accelerator, config: dict[str, Any], run: Path, *, resume_step: int) -> None:
    """Open the tracker that `tracker_options` chose, if any, and hand it the run's options as text and numbers.

    TensorBoard forgets what a resumed run will do again; with the others, a resumed run is a further run of its name.
    """
    if not accelerator.log_with:
        return
    plain = (str, int, float)
    options = {name: value if isinstance(value, plain) else str(value) for name, value in config.items()}
    chosen: dict[str, dict[str, Any]] = {"wandb": {"name": run.name}, "trackio": {"name": run.name}}
    if resume_step > 0:
        chosen["tensorboard"] = {"purge_step": resume_step + 1}
    accelerator.init_trackers(PROJECT, config=options, init_kwargs=chosen)


def log_to_tracker(accelerator: Accelerator, values: dict[str, Any], *, step: int) -> None:
    """Numbers as `train/NAME`, those of an evaluation as `evaluation/NAME`; what is not a finite number stays out."""
    group = values.get("event", "train")
    numbers = {
        f"{group}/{name}": value
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    if accelerator.trackers and numbers:
        accelerator.log(numbers, step=step)


def log_sheet_to_tracker(accelerator: Accelerator, sheet: Any, *, step: int) -> None:
    """A PIL image of evaluation samples, to TensorBoard and W&B; the other trackers get numbers only."""
    name = "evaluation/samples"
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [sheet]}, step=step)


def finish_tracker(accelerator: Accelerator) -> None:
    """Send what is left and close; unlike `Accelerator.end_training` this leaves the processes' group standing."""
    for tracker in accelerator.trackers:
        tracker.finish()
