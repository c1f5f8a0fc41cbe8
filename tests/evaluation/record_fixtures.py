"""Runs the peers of our metrics over the cases of metric_cases.py and writes what they say to fixtures/*.json.

    PYTHONPATH=tests python -m evaluation.record_fixtures --peers DIR --data DATA

DIR holds clones of huggingface/evaluate, cocodataset/panopticapi and bowenc0221/boundary-iou-api under their names,
and monai and opencv-python-headless, if they are not installed, in DIR/site (`pip install --no-deps --target`). DATA
is the folder with camvid, nuclei and hippocampus. The peers' code runs as it is, with exceptions that are stated where
they stand: boundary-iou-api gets `np.float` back and no process pool; MONAI rounds to 32 bits, and also runs with 64.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.metric_cases import Group, digest, random_groups, real_groups
from hf_maskformer.model.masks import ids_to_panoptic_png

FIXTURES = Path(__file__).resolve().parent / "fixtures"
Cases = Sequence[tuple[Any, Any]]
Figures = dict[str, Any]


def evaluate_mean_iou(peers: Path, settings: Figures, cases: Cases) -> Figures:
    module = load_file(peers / "evaluate" / "metrics" / "mean_iou" / "mean_iou.py")
    predictions, references = zip(*cases, strict=True)
    figures: Figures = module.mean_iou(predictions, references, settings["num_labels"], settings["ignore_index"])
    return figures


def boundary_mean_iou(peers: Path, settings: Figures, cases: Cases) -> Figures:
    """boundary-iou-api's boundary of each class, void joined to the class so that it makes no boundary towards it.

    The peer has no measure for semantic maps: the sums over images and the mean over classes are ours.
    """
    from boundary_iou.utils.boundary_utils import mask_to_boundary

    num_labels = settings["num_labels"]
    intersection, union = np.zeros((2, num_labels), dtype=np.int64)
    for prediction, reference in cases:
        void = reference == settings["ignore_index"]
        for label in range(num_labels):
            predicted, actual = (
                (mask_to_boundary(((labels == label) | void).astype(np.uint8)) > 0) & ~void
                for labels in (prediction, reference)
            )
            intersection[label] += np.sum(predicted & actual)
            union[label] += np.sum(predicted | actual)
    iou = intersection / union
    return {"boundary_iou": np.nanmean(iou), "per_category_boundary_iou": iou}


def boundary_of_masks(peers: Path, settings: Figures, cases: Cases) -> Figures:
    """The boundary of each mask and the boundary IoU of each pair."""
    import pycocotools.mask as mask_utils
    from boundary_iou.utils.boundary_utils import mask_to_boundary

    figures: Figures = {"boundaries": [], "boundary_iou": []}
    for pair in cases:
        boundaries = [mask_to_boundary(mask.astype(np.uint8), settings["dilation_ratio"]) for mask in pair]
        figures["boundaries"].append([digest(boundary.astype(bool)) for boundary in boundaries])
        one, other = (mask_utils.encode(np.asfortranarray(boundary)) for boundary in boundaries)
        empty = not any(boundary.any() for boundary in boundaries)
        figures["boundary_iou"].append(math.nan if empty else float(mask_utils.iou([one], [other], [0])[0, 0]))
    return figures


def panoptic_api(peers: Path, settings: Figures, cases: Cases) -> Figures:
    from panopticapi.evaluation import pq_compute_single_core

    return panoptic_quality(settings, cases, lambda *arguments: pq_compute_single_core(0, *arguments))


def boundary_panoptic_api(peers: Path, settings: Figures, cases: Cases) -> Figures:
    from boundary_iou.coco_panoptic_api.evaluation import pq_compute_single_core

    return panoptic_quality(
        settings,
        cases,
        lambda *arguments: pq_compute_single_core(0, *arguments, iou_type="boundary", dilation_ratio=0.02),
    )


def panoptic_quality(settings: Figures, cases: Cases, count: Callable[..., Any]) -> Figures:
    """Writes the PNG files that `count` reads and averages its counts with the peer's own method."""
    categories = {
        label: {"id": label, "isthing": int(label in settings["thing_label_ids"])}
        for label in range(settings["num_labels"])
    }
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for number, (prediction, reference) in enumerate(cases):
            pairs.append([])
            for kind, entry in (("gt", reference), ("pred", prediction)):
                name = f"{kind}{number}.png"
                Image.fromarray(ids_to_panoptic_png(entry["segmentation"])).save(Path(folder) / name)
                infos = [
                    {**info, "category_id": info["label_id"], "area": int(np.sum(entry["segmentation"] == info["id"]))}
                    for info in entry["segments_info"]
                ]
                pairs[-1].append({"image_id": number, "file_name": name, "segments_info": infos})
        stat = count(pairs, folder, folder, categories)
    figures: Figures = {}
    for name, isthing in (("", None), ("_things", True), ("_stuff", False)):
        try:
            average, per_class = stat.pq_average(categories, isthing=isthing)
        except ZeroDivisionError:  # the peer divides by the number of classes seen
            average, per_class = {"pq": math.nan, "sq": math.nan, "rq": math.nan}, None
        figures[f"pq{name}"] = average["pq"]
        if isthing is None:
            figures.update(sq=average["sq"], rq=average["rq"])
            figures["per_category"] = per_class and [per_class[label] for label in categories]
    counts = [stat[label] for label in categories]
    figures["counts"] = [[int(one.tp), int(one.fp), int(one.fn)] for one in counts]
    return figures


def coco_api(peers: Path, settings: Figures, cases: Cases) -> Figures:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return average_precision(settings, cases, COCO, COCOeval, "segm")


def boundary_coco_api(peers: Path, settings: Figures, cases: Cases) -> Figures:
    from boundary_iou.coco_instance_api import coco
    from boundary_iou.coco_instance_api.cocoeval import COCOeval
    from boundary_iou.utils.boundary_utils import augment_annotations_with_boundary_single_core

    def in_this_process(annotations: Any, ann_to_mask: Any, dilation_ratio: float) -> Any:
        return augment_annotations_with_boundary_single_core(0, annotations, ann_to_mask, dilation_ratio)

    np.float = float  # the peer is older than numpy 1.24, which dropped this name
    coco.augment_annotations_with_boundary_multi_core = in_this_process  # the same without starting a process pool
    return average_precision(settings, cases, coco.COCO, COCOeval, "boundary")


def average_precision(settings: Figures, cases: Cases, coco: Any, evaluator: Any, iou_type: str) -> Figures:
    predictions, references = coco(), coco()
    for api, column in ((predictions, 0), (references, 1)):
        api.dataset = {"images": [], "annotations": [], "categories": []}
        api.dataset["categories"] = [{"id": label, "name": str(label)} for label in range(settings["num_labels"])]
        for number, case in enumerate(cases):
            size, annotations = coco_annotations(case[column], number, len(api.dataset["annotations"]))
            if size is not None or column == 1:
                height, width = size or case[1]["masks"].shape[1:]
                api.dataset["images"].append({"id": number, "height": height, "width": width})
            api.dataset["annotations"] += annotations
        api.createIndex()
    evaluation = evaluator(references, predictions, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (T, R, K): all areas, 100 detections
    per_category = [precision[:, :, label] for label in range(settings["num_labels"])]
    figures: Figures = dict(zip(names, evaluation.stats[:6], strict=True))
    figures["per_category"] = [known.mean() if (known := one[one > -1]).size else -1.0 for one in per_category]
    return figures


def coco_annotations(entry: Figures, image_id: int, last_id: int) -> tuple[Any, list[Figures]]:
    """Size of the image, None without masks, and the annotations as the files or `loadRes` have them."""
    import pycocotools.mask as mask_utils

    annotations, size = [], None
    for index, mask in enumerate(entry["masks"]):
        rle = mask if isinstance(mask, dict) else mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        size = rle["size"]
        annotation = {"id": last_id + index + 1, "image_id": image_id, "category_id": int(entry["labels"][index])}
        annotation.update(segmentation=rle, bbox=mask_utils.toBbox(rle).tolist())
        annotation["iscrowd"] = int(entry["iscrowd"][index]) if "iscrowd" in entry else 0
        annotation["area"] = float(entry["area"][index] if "area" in entry else mask_utils.area(rle))
        if "scores" in entry:
            annotation["score"] = float(entry["scores"][index])
        annotations.append(annotation)
    return size, annotations


def monai_volumes(peers: Path, settings: Figures, cases: Cases) -> Figures:
    """Dice and HD95 (volumes, classes without the background), in 64 bits; HD95 and the means as MONAI rounds them."""
    import monai.metrics.hausdorff_distance
    import monai.metrics.utils
    from monai.metrics import DiceMetric, HausdorffDistanceMetric

    modules = (monai.metrics.hausdorff_distance, monai.metrics.utils)
    figures: Figures = {}
    for suffix, namespace in (("", TorchWithDoubles("torch")), ("_float32", torch)):
        for module in modules:
            module.torch = namespace
        metrics = {
            "dice": DiceMetric(include_background=False, reduction="none", get_not_nans=True),
            "hd95": HausdorffDistanceMetric(percentile=95, reduction="none", get_not_nans=True),
        }
        for prediction, reference in cases:
            one_hot = [
                torch.stack([torch.as_tensor(labels == label) for label in range(settings["num_labels"])])[None]
                for labels in (prediction, reference["segmentation"])
            ]
            metrics["dice"](*(labels.to(torch.float32 if suffix else torch.float64) for labels in one_hot))
            metrics["hd95"](*one_hot, spacing=reference["spacing"])
        for name, metric in metrics.items():
            figures[name + suffix] = metric.aggregate("none")[0]  # (volumes, classes)
            mean, known = metric.aggregate("mean_batch")
            figures[f"mean_{name}"] = torch.where(known > 0, mean, torch.nan)  # MONAI has 0 where nothing counts
    for module in modules:
        module.torch = torch
    return {name: figure.tolist() for name, figure in figures.items()}


class TorchWithDoubles(types.ModuleType):
    """torch for MONAI's modules, whose rounding to 32 bits (1e-5 mm in HD95) would hide a difference."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# file -> family of cases, the peer, its clone or its package
PEERS: dict[str, tuple[str, Callable[[Path, Figures, Cases], Figures], str]] = {
    "mean_iou": ("semantic", evaluate_mean_iou, "evaluate"),
    "boundary_iou": ("semantic", boundary_mean_iou, "boundary-iou-api"),
    "mask_boundary": ("masks", boundary_of_masks, "boundary-iou-api"),
    "panoptic_quality": ("panoptic", panoptic_api, "panopticapi"),
    "boundary_panoptic_quality": ("panoptic", boundary_panoptic_api, "boundary-iou-api"),
    "average_precision": ("instances", coco_api, "pycocotools"),
    "boundary_average_precision": ("instances", boundary_coco_api, "boundary-iou-api"),
    "volume_dice": ("volumes", monai_volumes, "monai"),
}

BESIDE = ("numpy", "pycocotools", "opencv-python-headless", "torch")  # what the peers stand on


def record(groups: Iterator[Group], ask: Callable[[Figures, Cases], Figures]) -> list[Figures]:
    """What the peer says about each case alone and about each group as one data set, beside hashes of the inputs."""
    return [
        {
            "settings": group.settings,
            "inputs": [digest([group.settings, *case]) for case in group.cases],
            "cases": [plain(ask(group.settings, [case])) for case in group.cases],
            "data_set": plain(ask(group.settings, group.cases)),
        }
        for group in groups
    ]


def plain(value: Any) -> Any:
    """Numbers of plain Python; nan becomes None, as JSON has no nan."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(entry) for entry in value]
    if isinstance(value, str) or value is None:
        return value
    number = float(value)
    if math.isnan(number):
        return None
    return int(number) if isinstance(value, int | np.integer) else number


def group_per_line(recorded: Figures) -> str:
    """JSON with a line for each group, so that a change shows where it is."""
    lines = []
    for name, value in recorded.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f'"{name}":{text}')
    return "{" + ",\n".join(lines) + "}\n"


def peer_version(peers: Path, name: str) -> str:
    """The commit of a clone, the version of a package."""
    if (peers / name / ".git").exists():
        command = ["git", "-C", str(peers / name), "rev-parse", "HEAD"]
        return "commit " + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return importlib.metadata.version(name)


def load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder with the clones")
    parser.add_argument("--data", type=Path, required=True, help="folder with camvid, nuclei and hippocampus")
    parser.add_argument("--only", nargs="*", choices=list(PEERS), default=list(PEERS), help="record these files only")
    arguments = parser.parse_args()
    peers = arguments.peers.resolve()
    sys.path[:0] = [str(peers / "boundary-iou-api"), str(peers / "panopticapi"), str(peers / "site")]
    warnings.simplefilter("ignore")  # 0 / 0 of absent classes
    FIXTURES.mkdir(exist_ok=True)
    for name in arguments.only:
        family, peer, source = PEERS[name]

        def ask(settings: Figures, cases: Cases, peer: Any = peer) -> Figures:
            with contextlib.redirect_stdout(io.StringIO()):
                return peer(peers, settings, cases)

        recorded: Figures = {"peer": source, "version": peer_version(peers, source)}
        recorded["beside"] = {package: peer_version(peers, package) for package in BESIDE}
        recorded["random"] = record(random_groups(family), ask)
        recorded["real"] = record(real_groups(family, arguments.data), ask)
        (FIXTURES / f"{name}.json").write_text(group_per_line(recorded))
        print(f"{name}: {source} {recorded['version']}")


if __name__ == "__main__":
    main()
