"""Side by side with transformers: how fast, and with how much memory, the same work is done.

    python benchmarks/speed.py --suite forward [--threads 1] [--repeats 5] [--size 512]

All sides of a line run in one process, from the same weights, by turns; a figure is the median over `--repeats`, after
`--warm-up` calls of each. With one thread it is CPU time, which other programs on the machine hardly change, with more
it is time on the clock. The table of a suite is kept in benchmarks/results/speed_SUITE.json.

Before the clock starts, the sides' results are compared: the largest difference, measured by the largest entry of the
tensor that it lies in, is part of the table. Where memory is asked for, each side runs in a process of its own: `peak`
is the most that the call's own tensors hold at one time, counted storage by storage (what a GPU's allocator calls
allocated), `resident` the peak of the process's resident memory above that before the call (Linux).

Suites:
    forward: MaskFormer and Mask2Former with a Swin-T backbone and 100 queries on one image, in bf16 too where the CPU
        can; the loss of two images
        with 12 targets together, ten layers, from query states and per-pixel embedding to the gradients of both;
        deformable attention alone, at the levels of the image.
    loss: that loss with 12 targets in each of two images.
    train-step: two images with 12 targets each, from pixels to the gradients of all weights.
    processor: images, with and without maps of 20 segments each, to a batch.
    postprocess: outputs for four images, 100 queries and 133 classes with masks of a quarter of the size, to label
        maps, instances and panoptic segments at the size of photos.
    pipeline: `pipeline("image-segmentation")` from a photo's file to its masks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpointing_memory import MIB, MMAP_THRESHOLD, LiveBytes
from machine import machine
from process_memory import reset_peak, resident
from speed_cases import PEER, Case, attention_case, bf16_case, forward_case, loss_case, train_step_case
from speed_postprocess import segments_case, semantic_case
from speed_processor import pipeline_case, processor_case
from training_rows import commit_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Suite:
    """Cases by name, each built for a size of the images (height and width); None: not for this machine."""

    size: int
    cases: dict[str, Callable[[int], Case | None]]


SUITES = {
    "forward": Suite(
        512,
        {
            "maskformer": partial(forward_case, "maskformer", aim=1.05),
            "mask2former": partial(forward_case, "mask2former", aim=1.5),
            "maskformer, bf16": partial(bf16_case, "maskformer", aim=1.6),
            "mask2former, bf16": partial(bf16_case, "mask2former", aim=1.6),
            "loss": partial(loss_case, targets=12, peak_aim=1 / 3),
            "attention": partial(attention_case, backward=False),
            "attention and gradients": partial(attention_case, backward=True),
        },
    ),
    "loss": Suite(384, {"loss": partial(loss_case, targets=24)}),
    "train-step": Suite(
        384,
        {
            "maskformer": partial(train_step_case, "maskformer", aim=1.2),
            "mask2former": partial(train_step_case, "mask2former", aim=1.6),
        },
    ),
    "processor": Suite(
        512,
        {
            "instance maps": partial(processor_case, maps="instances", aim=10.0),
            "instance maps, int64": partial(processor_case, maps="instances", dtype=np.int64, aim=10.0),
            "label maps": partial(processor_case, maps="labels", aim=10.0),
            "no maps": partial(processor_case, maps=None, aim=1.2),
        },
    ),
    "pipeline": Suite(1080, {"maskformer": partial(pipeline_case, aim=1.5)}),
    "postprocess": Suite(
        512,
        {
            "semantic, 480x640": partial(semantic_case, target=(480, 640), aim=6.0),
            "semantic, 1080x1920": partial(semantic_case, target=(1080, 1920), aim=12.0, peak_aim=0.2),
            "instance, 1080x1920": partial(segments_case, method="instance", target=(1080, 1920), aim=4.0),
            "panoptic, 1080x1920": partial(segments_case, method="panoptic", target=(1080, 1920), aim=4.0),
            "noise, semantic, 480x640": partial(semantic_case, target=(480, 640), aim=None, realistic=False),
            "noise, panoptic, 480x640": partial(
                segments_case, method="panoptic", target=(480, 640), aim=None, realistic=False
            ),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="forward")
    parser.add_argument("--size", type=int, help="height and width of the images; default: that of the suite")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="default: all cores of the process, %(default)s")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="of the suite, these cases")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help="measure one side's memory in this process")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/speed_SUITE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = SUITES[arguments.suite].cases
    arguments.size = arguments.size or SUITES[arguments.suite].size
    arguments.json = arguments.json or ROOT / "benchmarks" / "results" / f"speed_{arguments.suite}.json"
    unknown = sorted(set(arguments.only or ()) - cases.keys())
    if unknown:
        parser.error(f"--only: suite {arguments.suite!r} has no case {unknown[0]!r}, only {', '.join(cases)}")
    if arguments.peak is not None:
        name, side = arguments.peak
        print(json.dumps(peak_of(cases[name](arguments.size), side)))
        return
    rows = [row for name in arguments.only or cases for row in measured(name, cases[name], arguments)]
    report = {
        "suite": arguments.suite,
        "size": arguments.size,
        "warm_up": arguments.warm_up,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "clock": "CPU time" if arguments.threads == 1 else "time on the clock",
        "hardware": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit_of(ROOT),
        "rows": rows,
    }
    print(table(rows))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measured(name: str, build: Callable[[int], Case | None], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one case: one for each of our sides, none where the machine cannot run it.

    Raises:
        SystemExit: The sides do not give the same numbers; their times would mean nothing.
    """
    case = build(arguments.size)
    if case is None:
        print(f"{name}: left out, this CPU has no arithmetic for it")
        return []
    difference = case.difference()
    if not difference <= case.allowed:
        raise SystemExit(f"{name}: the sides' results differ by {difference:.1e}; allowed is {case.allowed:.0e}")
    seconds = medians(case.calls, warm_up=arguments.warm_up, repeats=arguments.repeats)
    peaks = {side: in_own_process(name, side, arguments) for side in case.calls} if case.inputs else {}
    rows = []
    for side in case.calls:
        if side == PEER:
            continue
        row = {
            "case": name,
            "title": case.title,
            "side": side,
            "seconds": seconds[side],
            "transformers_seconds": seconds[PEER],
        }
        row |= {"times_as_fast": seconds[PEER] / seconds[side], "aim": case.aim, "difference": difference}
        if peaks:
            row |= {"peak": peaks[side], "transformers_peak": peaks[PEER], "peak_aim": case.peak_aim}
            row |= {f"part_of_{key}": peaks[side][key] / peaks[PEER][key] for key in ("peak_mib", "resident_mib")}
        rows.append(row)
    return rows


def medians(calls: dict[str, Callable[[], Any]], *, warm_up: int, repeats: int) -> dict[str, float]:
    """Seconds of each call; they take turns, and every second round goes backwards."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_up + repeats):
        for name in list(calls) if index % 2 == 0 else reversed(list(calls)):
            torch.manual_seed(index)  # of random points
            started = clock()
            calls[name]()
            if index >= warm_up:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_own_process(case: str, side: str, arguments: argparse.Namespace) -> dict[str, float]:
    flags = ["--suite", arguments.suite, "--size", str(arguments.size), "--threads", str(arguments.threads)]
    command = [sys.executable, str(Path(__file__).resolve()), *flags, "--peak", case, side]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def peak_of(case: Case, side: str) -> dict[str, float]:
    """The peak as the process sees it in one call and as the tensors add up in another, after a third to warm up."""
    call = case.calls[side]
    call()
    before = resident("VmRSS")
    reset_peak()
    call()
    resident_mib = (resident("VmHWM") - before) / MIB
    with LiveBytes(list(case.inputs)) as live:
        call()
    return {"peak_mib": live.peak / MIB, "resident_mib": resident_mib}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':24} {'side':14} {'seconds':>9} {'transformers':>13} {'ratio':>6} {'aim':>5} {'difference':>11}"]
    for row in rows:
        aim = "" if row["aim"] is None else f"{row['aim']:.1f}"
        lines.append(
            f"{row['case']:24} {row['side']:14} {row['seconds']:9.4f} {row['transformers_seconds']:13.4f} "
            f"{row['times_as_fast']:6.2f} {aim:>5} {row['difference']:11.1e}"
        )
    for row in rows:
        for key, words in (("peak_mib", "peak of the tensors"), ("resident_mib", "peak of resident memory")):
            if "peak" in row:
                aim = "" if row["peak_aim"] is None else f" (at most {row['peak_aim']:.2f} is wanted)"
                lines.append(
                    f"{row['case']}, {row['side']}: {words} {row['peak'][key]:.0f} MiB, {PEER} "
                    f"{row['transformers_peak'][key]:.0f} MiB: {row[f'part_of_{key}']:.2f}{aim}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
