"""Where the numbers of a run go: one JSON object per line in log.jsonl, and a progress bar."""

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_maskformer.evaluation.json_format import json_ready


class JsonlLog:
    """Append-only log; a resumed run first drops the lines of steps it will do again."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        path.write_text("".join(line + "\n" for line in lines if step_of(line) <= resume_step and resume_step > 0))

    def write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def step_of(line: str) -> float:
    """The step of a log line; a line cut off by a kill counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")


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
