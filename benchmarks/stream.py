"""A long stream through `Predictor.stream`: its order, its memory, and what overlapping the stages gains.

    python benchmarks/stream.py CHECKPOINT --images FOLDER [--frames 300] [--threads 1]

The images of FOLDER are repeated until there are FRAMES. Resident memory is read after every 50 results; it must not
grow from the second reading to the last by more than one part in twenty.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from machine import machine
from process_memory import resident
from training_rows import commit_of

from hf_maskformer.inference import Predictor
from hf_maskformer.inference.frames import folder_images

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
RESULTS_A_READING = 50
ALLOWED_GROWTH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/stream.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    predictor = Predictor(arguments.checkpoint, device="cpu", batch_size=1)
    files = folder_images(arguments.images)
    given: list[str] = []

    def frames() -> Iterator[Path]:
        for number, path in enumerate(islice(cycle(files), arguments.frames)):
            given.append(path.stem if number < len(files) else f"{path.stem}-{number // len(files) + 1}")
            yield path

    started, memory, names = time.perf_counter(), [], []
    for result in predictor.stream(frames()):
        names.append(result.name)
        if len(names) % RESULTS_A_READING == 0:
            memory.append(round(resident("VmRSS") / MIB, 1))
    seconds = time.perf_counter() - started
    if names != given or len(names) != arguments.frames:
        raise SystemExit("the results are not those of the frames in their order")
    report = {
        "frames": arguments.frames,
        "threads": arguments.threads,
        "hardware": machine(),
        "commit": commit_of(ROOT),
        "frames_per_second": arguments.frames / seconds,
        "resident_mib": memory,
    }
    print(f"{arguments.frames} frames in order, {report['frames_per_second']:.1f} a second; resident MiB: {memory}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if len(memory) > 2 and memory[-1] > ALLOWED_GROWTH * memory[1]:
        raise SystemExit("memory grows with the number of frames")


if __name__ == "__main__":
    main()
