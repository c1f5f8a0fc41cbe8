"""How fast and how large the metrics are, beside their peers: one run, interleaved; equal to 1e-9 or it fails.

    python benchmarks/metrics.py --peers DIR [--data ../shared/data] [--repeats 9]

DIR holds `panopticapi` (a checkout of cocodataset/panopticapi) and `evaluate_mean_iou` (the folder metrics/mean_iou of
huggingface/evaluate). Without --peers their rows are marked "not run"; pycocotools is taken from the environment.
A ratio is the peer's CPU time over ours in the same round: median of the rounds, least and greatest beside it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import metric_inputs as inputs
import metric_peers as peers
import numpy as np
import torch
from PIL import Image
from process_memory import reset_peak, resident

from hf_maskformer.evaluation import MaskAveragePrecision, MeanIoU, PanopticQuality
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png, panoptic_png_to_ids

TOLERANCE = 1e-9
LEAST_TIMED = 0.05  # seconds; a shorter call is repeated within a round
GOALS = {"mean_iou": 30, "panoptic_quality": 5, "average_precision": 3}
MEMORY_GOAL_MB = 500
MB = 2**20
MEMORY_CASES = ("mean_iou", "panoptic_quality", "average_precision", "average_precision_rle")
PEER_FOLDERS = {"panopticapi": "panopticapi/evaluation.py", "evaluate_mean_iou": "mean_iou.py"}

Figure = Callable[[], float]


@dataclass
class Case:
    metric: str
    data: str
    way: str  # what is timed
    ours: Figure
    peers: dict[str, Figure | None] = field(default_factory=dict)  # None: not run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with panopticapi and evaluate_mean_iou")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--images", type=int, default=200, help="images of the memory measurement")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "metrics.json")
    parser.add_argument("--memory", choices=MEMORY_CASES, help=argparse.SUPPRESS)  # one child process each
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(evaluate_and_watch(arguments.memory, arguments.images)))
        return
    check_peers(parser, arguments.peers)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for case in cases(arguments.peers, arguments.data, Path(folder))
            for row in timed(case, arguments.repeats)
        ]
    memory = [measure_memory(name, arguments.images) for name in MEMORY_CASES]
    for line in table(rows, memory):
        print(line)
    report = {"machine": machine(), "repeats": arguments.repeats, "goals": GOALS, "rows": rows}
    report |= {"memory_images": arguments.images, "memory_goal_mb": MEMORY_GOAL_MB, "memory": memory}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def check_peers(parser: argparse.ArgumentParser, folder: Path | None) -> None:
    """Ends the program where a peer that was promised is not there."""
    for name, file in PEER_FOLDERS.items():
        if folder is not None and not (folder / name / file).is_file():
            parser.error(f"--peers {folder}: there is no {name}/{file}; leave --peers out to run without the peers")


def machine() -> dict[str, Any]:
    names = ("numpy", "pillow", "torch", "pycocotools", "evaluate")
    known = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(_module(name))}
    return {"cpu": f"{os.cpu_count()} CPU cores, 1 thread", "python": platform.python_version(), "versions": known}


def _module(name: str) -> str:
    return {"pillow": "PIL"}.get(name, name)


# --- what is compared ------------------------------------------------------------------------------------------------


def cases(peer_folder: Path | None, data: Path, folder: Path) -> Iterator[Case]:
    mean_iou = peers.EvaluateMeanIoU(peer_folder / "evaluate_mean_iou", folder) if peer_folder else None
    panoptic = peers.PanopticApi(peer_folder / "panopticapi") if peer_folder else None
    scenes = [inputs.synthetic_scene(seed) for seed in range(4)]
    side = f"synthetic {inputs.SIDE}x{inputs.SIDE}, {inputs.INSTANCES} instances"
    maps = [(prediction.semantic(), reference.semantic()) for reference, prediction in scenes]
    yield mean_iou_case(mean_iou, maps, inputs.CLASSES + 1, f"{side}, 4 images")
    wide = [(prediction.astype(np.int64), reference) for prediction, reference in maps]
    yield mean_iou_case(mean_iou, wide, inputs.CLASSES + 1, f"{side}, 4 images, int64 predictions")
    entries = [(prediction.panoptic(), reference.panoptic()) for reference, prediction in scenes]
    things = set(range(inputs.CLASSES))
    yield from panoptic_cases(panoptic, entries, things, inputs.CLASSES, folder / "synthetic", f"{side}, 4 images")
    dense = [inputs.instance_entries(seed) for seed in range(2)]
    yield from instance_cases(dense, inputs.CLASSES, f"{side}, 2 images")
    del dense
    if not data.is_dir():
        print(f"no real data at {data}: its rows are left out")
        return
    maps = inputs.camvid_maps(data, 40)
    yield mean_iou_case(mean_iou, maps, inputs.CAMVID_CLASSES, "CamVid val, 40 images 480x360")
    entries = inputs.nuclei_panoptic(data, 40)
    yield from panoptic_cases(panoptic, entries, {0}, 2, folder / "nuclei", "nuclei val, 40 images")
    yield from instance_cases(inputs.nuclei_instances(data, 20), 1, "nuclei val, 20 images")


def mean_iou_case(peer: peers.EvaluateMeanIoU | None, pairs: peers.Pairs, num_labels: int, data: str) -> Case:
    def ours() -> float:
        return float(MeanIoU(num_labels).update(*zip(*pairs, strict=True)).compute()["mean_iou"])

    others: dict[str, Figure | None] = {"evaluate mean_iou": None, "its function alone": None}
    if peer is not None:
        others = {
            "evaluate mean_iou": partial(peer.module, pairs, num_labels),
            "its function alone": partial(peer.function_only, pairs, num_labels),
        }
    return Case("mean_iou", data, "maps to result", ours, others)


def panoptic_cases(
    peer: peers.PanopticApi | None, pairs: peers.Pairs, things: set[int], num_labels: int, folder: Path, data: str
) -> Iterator[Case]:
    """From a model's id maps, which the peer takes as PNG files only; from PNG files on both sides, where the decoder
    takes most of the time; and from the same colours in memory, without any file.
    """
    sides = dict(zip(("prediction", "reference"), map(list, zip(*pairs, strict=True)), strict=True))
    annotations = {name: list(inputs.write_panoptic_pngs(folder / name, side)) for name, side in sides.items()}
    colours = {
        str(folder / name / one["file_name"]): ids_to_panoptic_png(entry["segmentation"])
        for name, side in sides.items()
        for one, entry in zip(annotations[name], side, strict=True)
    }

    def ours(read: Callable[[str], np.ndarray]) -> float:
        metric = PanopticQuality(sorted(things), num_labels)
        for predicted, actual in zip(annotations["prediction"], annotations["reference"], strict=True):
            entries = [
                {"segmentation": panoptic_png_to_ids(read(str(folder / name / one["file_name"]))), **one}
                for name, one in (("prediction", predicted), ("reference", actual))
            ]
            metric.update(entries[:1], entries[1:])
        return float(metric.compute()["pq"])

    def read_png(path: str) -> np.ndarray:
        with Image.open(path) as png:
            return np.asarray(png)

    def ours_from_ids() -> float:
        metric = PanopticQuality(sorted(things), num_labels)
        for prediction, actual in zip(sides["prediction"], annotations["reference"], strict=True):
            ids = panoptic_png_to_ids(read_png(str(folder / "reference" / actual["file_name"])))
            metric.update([prediction], [{"segmentation": ids, **actual}])
        return float(metric.compute()["pq"])

    name = "panopticapi single core"
    rest = (folder, things, num_labels)
    both = (annotations["reference"], annotations["prediction"])
    maps = [entry["segmentation"] for entry in sides["prediction"]]
    from_ids = partial(peer.from_ids, *both, maps, *rest) if peer else None
    from_files = partial(peer.from_files, *both, *rest) if peer else None
    from_colours = partial(peer.from_colours, *both, colours, *rest) if peer else None
    yield Case("panoptic_quality", data, "predicted ids to result", ours_from_ids, {name: from_ids})
    yield Case("panoptic_quality", data, "PNG files to result", partial(ours, read_png), {name: from_files})
    yield Case(
        "panoptic_quality", data, "PNG colours to result", partial(ours, colours.__getitem__), {name: from_colours}
    )


def instance_cases(pairs: peers.Pairs, num_labels: int, data: str) -> Iterator[Case]:
    """From dense masks, and from the same masks as run-length codes."""
    coded = [
        tuple({**entry, "masks": [encode_rle(mask) for mask in entry["masks"]]} for entry in pair) for pair in pairs
    ]

    def ours(chosen: peers.Pairs) -> float:
        return float(MaskAveragePrecision(num_labels).update(*zip(*chosen, strict=True)).compute()["map"])

    def peer(chosen: peers.Pairs, encoded: bool) -> float:
        return peers.coco_average_precision(chosen, num_labels, encoded)["map"]

    there = importlib.util.find_spec("pycocotools") is not None
    for way, chosen, encoded in (("dense masks to result", pairs, False), ("RLE to result", coded, True)):
        other = partial(peer, chosen, encoded) if there else None
        yield Case("average_precision", data, way, partial(ours, chosen), {"pycocotools": other})


# --- time ------------------------------------------------------------------------------------------------------------


def timed(case: Case, repeats: int) -> list[dict[str, Any]]:
    """One row per peer. In each round every contender runs once, in turn."""
    running = {name: figure for name, figure in case.peers.items() if figure is not None}
    expected = case.ours()
    for name, figure in running.items():
        difference = abs(figure() - expected)
        if not difference <= TOLERANCE:
            raise ValueError(f"{case.metric}, {case.data}, {case.way}: {name} differs by {difference}")
    contenders = {"ours": case.ours, **running}
    calls = {name: calls_per_round(figure) for name, figure in contenders.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, figure in contenders.items():
            rounds[name].append(seconds(figure, calls[name]))
    return [row(case, name, rounds) for name in case.peers]


def calls_per_round(figure: Figure) -> int:
    return max(1, round(LEAST_TIMED / max(seconds(figure, 1)[0], 1e-6)))


def seconds(figure: Figure, calls: int) -> tuple[float, float]:
    """CPU and wall time of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        figure()
    return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls


def row(case: Case, peer: str, rounds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"metric": case.metric, "data": case.data, "way": case.way, "peer": peer}
    result |= {f"ours_{clock}_ms": median_ms(rounds["ours"], index) for index, clock in enumerate(("cpu", "wall"))}
    if peer not in rounds:
        return {**result, "ratio": "not run"}
    result |= {f"peer_{clock}_ms": median_ms(rounds[peer], index) for index, clock in enumerate(("cpu", "wall"))}
    ratios = [other[0] / own[0] for own, other in zip(rounds["ours"], rounds[peer], strict=True)]
    spread = {"ratio_least": round(min(ratios), 2), "ratio_greatest": round(max(ratios), 2)}
    return {**result, "ratio": round(statistics.median(ratios), 2), **spread}


def median_ms(times: list[tuple[float, float]], index: int) -> float:
    return round(1000 * statistics.median(pair[index] for pair in times), 3)


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(name: str, images: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory", name, "--images", str(images)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def evaluate_and_watch(name: str, images: int) -> dict[str, Any]:
    """Evaluates images that are made one at a time; resident memory of this process in MB."""
    imported = resident("VmRSS") / MB
    reset_peak()
    metric: Any = {"mean_iou": MeanIoU(inputs.CLASSES + 1)}.get(name)
    if name == "panoptic_quality":
        metric = PanopticQuality(range(inputs.CLASSES), inputs.CLASSES)
    elif name.startswith("average_precision"):
        metric = MaskAveragePrecision(inputs.CLASSES)
    for seed in range(images):
        metric.update(*([entry] for entry in memory_entries(name, seed)))
    metric.compute()
    peak = resident("VmHWM") / MB
    figures = {"imported_mb": imported, "peak_mb": peak, "added_mb": peak - imported}
    return {"metric": name, **{key: round(value) for key, value in figures.items()}}


def memory_entries(name: str, seed: int) -> tuple[Any, Any]:
    if name == "average_precision":
        return inputs.instance_entries(seed)
    reference, prediction = inputs.synthetic_scene(seed)
    if name == "mean_iou":
        return prediction.semantic(), reference.semantic()
    if name == "panoptic_quality":
        return prediction.panoptic(), reference.panoptic()
    scores = np.random.default_rng(seed).random(inputs.INSTANCES)
    found = {"masks": prediction.codes(), "scores": scores, "labels": prediction.labels}
    return found, {"masks": reference.codes(), "labels": reference.labels}


def table(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> Iterator[str]:
    for one in rows:
        spread = f" ({one['ratio_least']} to {one['ratio_greatest']})" if "ratio_least" in one else ""
        times = f"{one['ours_cpu_ms']:9.2f} ms, peer {one.get('peer_cpu_ms', 'not run'):>9} ms"
        yield f"{one['metric']:18} {one['way']:22} {times}  ratio {one['ratio']}{spread}  {one['peer']}; {one['data']}"
    for one in memory:
        figures = f"peak {one['peak_mb']} MB: {one['imported_mb']} MB imports, {one['added_mb']} MB added"
        yield f"{one['metric']:22} {figures}"


if __name__ == "__main__":
    main()
