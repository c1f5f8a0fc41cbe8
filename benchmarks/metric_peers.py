"""The peers of benchmarks/metrics.py, called as their users call them. None of them is part of this repository."""

import contextlib
import copy
import importlib
import io
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

Pairs = list[tuple[Any, Any]]
AP_FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


class EvaluateMeanIoU:
    """`evaluate`'s mean_iou, from its own folder: the whole module, and its function alone."""

    def __init__(self, folder: Path, cache: Path) -> None:
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
        import evaluate

        self.metric = evaluate.load(str(folder / "mean_iou.py"), cache_dir=str(cache))
        self.function = sys.modules[type(self.metric).__module__].mean_iou

    def module(self, pairs: Pairs, num_labels: int) -> float:
        predictions, references = zip(*pairs, strict=True)
        with _quiet():
            result = self.metric.compute(
                predictions=list(predictions), references=list(references), num_labels=num_labels, ignore_index=255
            )
        return float(result["mean_iou"])

    def function_only(self, pairs: Pairs, num_labels: int) -> float:
        predictions, references = zip(*pairs, strict=True)
        with _quiet():
            return float(self.function(predictions, references, num_labels, 255)["mean_iou"])


class PanopticApi:
    """panopticapi's pq_compute_single_core, from PNG files or from the same colours in memory."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        self.evaluation = importlib.import_module("panopticapi.evaluation")
        self.id2rgb = importlib.import_module("panopticapi.utils").id2rgb
        self.image = self.evaluation.Image

    def from_files(
        self, references: list[Any], predictions: list[Any], folder: Path, things: set[int], k: int
    ) -> float:
        categories = {label: {"id": label, "isthing": int(label in things)} for label in range(k)}
        annotations = copy.deepcopy(list(zip(references, predictions, strict=True)))
        with _quiet():
            stat = self.evaluation.pq_compute_single_core(
                0, annotations, str(folder / "reference"), str(folder / "prediction"), categories
            )
        return float(stat.pq_average(categories, isthing=None)[0]["pq"])

    def from_ids(
        self, references: list[Any], predictions: list[Any], maps: list[np.ndarray], folder: Path, *rest: Any
    ) -> float:
        """Its function reads predictions from PNG files: they are written first, as its users do."""
        for annotation, ids in zip(predictions, maps, strict=True):
            Image.fromarray(self.id2rgb(ids)).save(folder / "prediction" / annotation["file_name"])
        return self.from_files(references, predictions, folder, *rest)

    def from_colours(
        self, references: list[Any], predictions: list[Any], colours: dict[str, np.ndarray], folder: Path, *rest: Any
    ) -> float:
        """Its opening of a file is answered with the array."""
        self.evaluation.Image = SimpleNamespace(open=colours.__getitem__)
        try:
            return self.from_files(references, predictions, folder, *rest)
        finally:
            self.evaluation.Image = self.image


def coco_average_precision(pairs: Pairs, num_labels: int, encoded: bool = False) -> dict[str, float]:
    """pycocotools from dense masks to its six figures: encode, load, evaluate, accumulate, summarize.

    With `encoded` the masks are COCO codes already.
    """
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def code(mask: Any) -> Any:
        return mask if encoded else coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    images, annotations, results = [], [], []
    for image_id, (prediction, reference) in enumerate(pairs):
        for label, mask in zip(reference["labels"].tolist(), reference["masks"], strict=True):
            one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "segmentation": code(mask)}
            one.update(area=float(coco_mask.area(one["segmentation"])), iscrowd=0, bbox=[0, 0, 1, 1])
            annotations.append(one)
        columns = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), prediction["masks"], strict=True)
        for label, score, mask in columns:
            found = {"image_id": image_id, "category_id": label, "segmentation": code(mask), "score": score}
            results.append(found)
        height, width = annotations[-1]["segmentation"]["size"]
        images.append({"id": image_id, "height": height, "width": width})
    categories = [{"id": label, "name": str(label)} for label in range(num_labels)]
    with _quiet():
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(AP_FIGURES, evaluation.stats[:6].tolist(), strict=True))


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
