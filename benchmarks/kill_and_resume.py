"""A run that is killed again and again and resumed each time ends with the bits of one that was not.

    python scripts/kill_and_resume.py [--kills 20] [--seed 0]

A small model is trained on the built-in scenes without interruption. Then the same run is killed by SIGKILL and goes
on with `--resume`, until it ends; further runs follow until all kills are done. Half of the moments are uniform in
time. The others come 0 to 30 ms after something half-written appears in the run's folder: a checkpoint, best/, final/
or a file. Each run's checkpoints (weights, average, optimizer, state), best/, final/, metrics and log are compared
with the uninterrupted one's, bit for bit but for times. The exit code is 1 if anything differs, if a reader process
outlives its run, or if no moment fell into a step, an evaluation or the writing of a checkpoint. Needs Linux.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from killed_run import Board, ForkedRun, half_written, kill_after, kill_while_writing
from safetensors.torch import load_file

from hf_maskformer.training.checkpoint import newest_checkpoint

# Small enough for a second of start-up, and with what a resumed run has to restore: an average, dropout, random
# augmentation, reader processes, a best model that is replaced.
RECIPE: dict[str, Any] = {
    "dataset": "scenes",
    "task": "panoptic",
    "dataset_options": {"image_size": 64, "length": 24},
    "val_dataset_options": {"image_size": 64, "length": 16},
    "tracker": None,  # its files are named after the time of day
    "config_overrides": {
        "backbone_config": {
            "model_type": "resnet",
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "embedding_size": 8,
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "image_size": [64, 64],
        "pixel_decoder_dim": 16,
        "mask_dim": 16,
        "query_decoder_dim": 16,
        "query_decoder_ffn_dim": 32,
        "query_decoder_layers": 2,
        "query_decoder_heads": 2,
        "query_decoder_dropout": 0.1,
        "num_queries": 12,
    },
    "max_steps": 48,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "num_workers": 2,
    "evaluations": 4,
    "num_samples": 2,
    "log_every": 1,
    "checkpoint_every": 4,
}
# Times and memory: all that may differ between two runs.
MEASURED = {
    *("seconds", "data_seconds", "minutes", "training_minutes", "seconds_per_step"),
    *("images_per_second", "data_wait_share", "peak_memory_mib"),
}
TO_HIT = {"a step": {"step"}, "an evaluation": {"evaluation", "samples"}, "a checkpoint": {"checkpoint"}}
LONGEST_PART = 0.6  # of the uninterrupted run's time; a run is then killed a few times before its end
MOST_PASSED_OVER = 6  # writes that a kill waits for at most
LONGEST_DELAY = 0.03  # seconds
READERS_MAY_TAKE = 15.0  # seconds; torch's look for their parent every 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; they also depend on the machine's speed")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kill_and_resume.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process that has started threads must not be forked
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = killed_and_whole(Path(folder), arguments.kills, arguments.seed)
    report = {"machine": machine(), "seed": arguments.seed, "seconds": time.perf_counter() - started, **report}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    print(
        f"{len(report['kills'])} kills in {report['runs']} runs, {report['tensors']} tensors compared in "
        f"{report['seconds']:.0f} s; {report['repeated_log_lines']} log lines stand twice: "
        + ("not the same" if report["problems"] else "the same, bit for bit")
    )
    return 1 if report["problems"] else 0


def killed_and_whole(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The uninterrupted run, the killed ones, and everything in which they differ."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    board, rng = Board(), random.Random(seed)
    whole = train(folder, "whole", board)
    whole.wait()
    check_ended(whole, folder / "whole.out")
    duration = whole.seconds()
    print(f"uninterrupted: {RECIPE['max_steps']} steps in {duration:.1f} s")
    print(f"{'run':>3} {'kill':>4} {'at':>7}  {'step':>4}  {'doing':10}  {'left half-written':40}  goes on from")

    rows: list[dict[str, Any]] = []
    dead: list[ForkedRun] = []
    problems: list[str] = []
    runs = tensors = repeated = 0
    while len(rows) < kills or (kills >= 10 and len(rows) < 2 * kills and missed(rows)):
        runs += 1
        name = f"killed-{runs}"
        last = kills if len(rows) < kills else 2 * kills
        found = killed_run(folder, name, board, rng, duration, first=len(rows), last=last)
        rows += [{"run": runs, **row} for row, _ in found]
        dead += [process for _, process in found]
        count, differing = differences(folder / "whole", folder / name)
        tensors += count
        repeated += repeated_lines(folder / name / "log.jsonl")
        problems += [f"{name}: {difference}" for difference in differing]
    problems += [f"no kill fell into: {doing}" for doing in (missed(rows) if kills >= 10 else ())]
    seconds, surviving = readers_end(dead)
    problems += [f"process {pid} outlived its run" for pid in surviving]
    counts = {doing: sum(row["doing"] == doing for row in rows) for doing in sorted({row["doing"] for row in rows})}
    print("kills by what the run was doing: " + ", ".join(f"{doing} {count}" for doing, count in counts.items()))
    return {
        "runs": runs,
        "tensors": tensors,
        "repeated_log_lines": repeated,
        "uninterrupted_seconds": duration,
        "steps": RECIPE["max_steps"],
        "doing": counts,
        "readers_gone_after_seconds": seconds,
        "problems": problems,
        "kills": rows,
    }


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """What none of the kills has hit."""
    hit = {row["doing"] for row in rows}
    return [name for name, doings in TO_HIT.items() if not doings & hit]


def train(folder: Path, name: str, board: Board) -> ForkedRun:
    """The run `name` of `folder`, begun or resumed."""
    run = folder / name
    arguments = ["train", "--recipe", str(folder / "recipe.yaml"), "--output-dir", str(run)]
    resume = ["--resume"] if run.exists() else []
    return ForkedRun([*arguments, *resume], folder / f"{name}.out", board)


def killed_run(
    folder: Path, name: str, board: Board, rng: random.Random, duration: float, *, first: int, last: int
) -> list[tuple[dict[str, Any], ForkedRun]]:
    """Kill the run and resume it until it ends; after kill number `last` it may."""
    found: list[tuple[dict[str, Any], ForkedRun]] = []
    run = folder / name
    while True:
        process = train(folder, name, board)
        number = first + len(found)
        if number >= last:
            process.wait()
        elif number % 2 == 0:
            kill_after(process, rng.uniform(0.0, LONGEST_PART * duration))
        else:
            passed_over, delay = rng.randint(0, MOST_PASSED_OVER), rng.uniform(0.0, LONGEST_DELAY)
            kill_while_writing(process, run, passed_over=passed_over, delay=delay)
        if process.code is not None and process.code >= 0:
            check_ended(process, folder / f"{name}.out")
            return found
        checkpoint = newest_checkpoint(run / "checkpoints")
        row = {
            "kind": "time" if number % 2 == 0 else "writing",
            "second": process.seconds(),
            "step": board.step,
            "doing": board.doing,
            "half_written": sorted(half_written(run)),
            "goes_on_from": checkpoint.name if checkpoint else "the beginning",
        }
        found.append((row, process))
        step = "-" if row["step"] is None else row["step"]
        half = ", ".join(row["half_written"]) or "-"
        print(
            f"{name.split('-')[1]:>3} {number + 1:4} {row['second']:6.2f}s  {step:>4}  {row['doing']:10}  {half:40}  "
            f"{row['goes_on_from']}",
            flush=True,
        )


def check_ended(process: ForkedRun, output: Path) -> None:
    if process.code != 0:
        raise RuntimeError(f"the run ended with exit code {process.code}:\n{output.read_text()[-3000:]}")


def readers_end(dead: list[ForkedRun]) -> tuple[float, list[int]]:
    """Seconds until no process of the killed runs is left, and those that are left at the end of the patience."""
    started = time.perf_counter()
    while True:
        surviving = [pid for process in dead for pid in process.survivors()]
        seconds = time.perf_counter() - started
        if not surviving or seconds > READERS_MAY_TAKE:
            return seconds, surviving
        time.sleep(0.1)


def differences(whole: Path, cut: Path) -> tuple[int, list[str]]:
    """Number of tensors compared, and in words everything in which the run `cut` is not the run `whole`."""
    tensors, found = 0, []
    paths = [sorted(contents(run)) for run in (whole, cut)]
    found += [f"{path} is in one run only" for path in sorted(set(paths[0]) ^ set(paths[1]))]
    for path in sorted(set(paths[0]) & set(paths[1])):
        one, other = whole / path, cut / path
        if path.endswith(".safetensors"):
            expected, given = load_file(one), load_file(other)
            tensors += len(expected)
            found += [f"{path}: {name}" for name in sorted(set(expected) ^ set(given))]
            found += [
                f"{path}: {name}" for name in expected if name in given and not same(expected[name], given[name])
            ]
        elif path.endswith(".jsonl"):
            found += [f"{path}: {line}" for line in sorted(log_lines(one) ^ log_lines(other))]
        elif path.endswith(".json"):
            found += [path] if plain(json.loads(one.read_text())) != plain(json.loads(other.read_text())) else []
        elif one.read_bytes() != other.read_bytes():
            found.append(path)
    return tensors, found


def contents(run: Path) -> list[str]:
    """The files of a run that must not depend on interruptions; a picture of times does, and so does its own name."""
    files = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    return [path for path in files if path not in ("training_curves.png", "train_config.json")]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: of one type and shape, nan equals nan, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def plain(value: Any) -> Any:
    """A JSON value without what is measured."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items() if name not in MEASURED}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def log_lines(path: Path) -> set[str]:
    return {json.dumps(plain(json.loads(line)), sort_keys=True) for line in path.read_text().splitlines()}


def repeated_lines(path: Path) -> int:
    """Lines that stand in a log twice: an evaluation that a kill cut off after its line was written is done again."""
    return len(path.read_text().splitlines()) - len(log_lines(path))


def machine() -> dict[str, Any]:
    return {
        "device": f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
