"""Runs a model over a data set and returns the metrics of its task, at the original size of every image."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.segmentation_data import SegmentationData, panoptic_reference, semantic_reference
from hf_maskformer.evaluation.instance import MaskAveragePrecision
from hf_maskformer.evaluation.panoptic import PanopticQuality
from hf_maskformer.evaluation.semantic import MeanIoU
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.postprocess import instance_candidates, logits_per_image
from hf_maskformer.visualize import fill_segments

# AP ranks all detections by score; a score threshold would only cut off the tail of its curve.
AP_SCORE_THRESHOLD = 0.0
VOID_LABEL = -1  # class of the pixels of a merged panoptic map that no segment holds
AP_SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")

logger = logging.getLogger(__name__)

Sizes = Sequence[tuple[int, int]]
Row = dict[str, Any]


def evaluate(
    model: Any,
    processor: Any,
    data: SegmentationData,
    task: str | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: bool = True,
    limit: int | None = None,
    on_bad_sample: str = "raise",
) -> dict[str, Any]:
    """Metrics of `model` on `data`.

    Images go through the processor at its own size, predictions are resized to the original image and compared there
    with the untouched reference. The model is moved to `device` and runs in eval mode; the mode of each of its modules
    is put back, also after an error. Instances are ranked by score without a score threshold; semantic and panoptic
    results use the processor's stored thresholds.

    Args:
        model: a `HfMaskFormerForUniversalSegmentation`.
        processor: its image processor; not changed.
        data: what `hf_maskformer.data.load.load` returned, loaded for the same task or for panoptic, which holds all.
        task: "semantic", "instance" or "panoptic"; None takes the processor's, and where it has none the data's.
        batch_size: images per forward pass.
        device: where the model runs.
        progress: show a progress bar.
        limit: evaluate the first `limit` images only.
        on_bad_sample: "raise" the ValueError of an image that cannot be read, or "skip" it with a warning.

    Returns:
        One flat dict. semantic: the keys of `MeanIoU`; instance: those of `MaskAveragePrecision`; panoptic: those of
        `PanopticQuality`, `mean_iou` of the merged class map and, where there are thing classes, `map`, `map_50`,
        `map_75`, `map_small`, `map_medium`, `map_large` and `map_per_category` of the thing instances. Where images
        were skipped, `skipped` is their number.

    Raises:
        ValueError: no (readable) images, an unknown task, or model, processor and data disagree on task or classes.
    """
    task = task or processor.task or data.task
    _check_arguments(data, task, batch_size, limit, on_bad_sample)
    count = len(data) if limit is None else min(limit, len(data))
    _check_classes(model.config, processor, data.label_spec, task)
    processor = copy.copy(processor)
    processor.task = None  # no post-processing method is hidden: panoptic evaluation also needs the instances
    scorer = SCORERS[task](data.label_spec)
    model.to(device)
    skipped = 0
    bar = tqdm(total=count, disable=not progress, unit="image", desc=f"evaluate {task}")
    with bar, _eval_mode(model), torch.inference_mode():
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            images = _read_images(data, indices, on_bad_sample)
            skipped += len(indices) - len(images)
            if images:
                _score(model, processor, scorer, images, [data.row(index) for index in images], device)
            bar.update(len(indices))
    if skipped == count:
        raise ValueError(f"none of the {count} images can be read")
    return {**scorer.compute(), **({"skipped": skipped} if skipped else {})}


def _score(
    model: Any,
    processor: Any,
    scorer: "Scorer",
    images: Mapping[int, np.ndarray],
    rows: Sequence[Row],
    device: str | torch.device,
) -> None:
    """Predict one batch and add it to the scorer."""
    inputs = processor(images=list(images.values()), return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
    scorer.add(processor, outputs, [(image.shape[0], image.shape[1]) for image in images.values()], rows)


class Scorer(Protocol):
    """Post-processes the outputs of one batch for a task and compares them with the rows of its images."""

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> None: ...

    def compute(self) -> dict[str, Any]: ...


class SemanticScorer:
    def __init__(self, label_spec: LabelSpec) -> None:
        self.label_spec = label_spec
        self.mean_iou = MeanIoU(label_spec.num_labels, label_spec.ignore_index)

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> None:
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
        self.mean_iou.update(maps, [semantic_reference(row, self.label_spec) for row in rows])

    def compute(self) -> dict[str, Any]:
        return self.mean_iou.compute()


class InstanceScorer:
    """Mask AP of the things. Uses the ranked candidates, not the painted map: its overlap rule is no part of AP."""

    def __init__(self, label_spec: LabelSpec) -> None:
        self.thing_label_ids = label_spec.thing_label_ids
        self.average_precision = MaskAveragePrecision(label_spec.num_labels)

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> None:
        images = logits_per_image(outputs, sizes)
        for row, (class_logits, mask_logits, size, extent) in zip(rows, images, strict=True):
            candidates = instance_candidates(
                class_logits,
                mask_logits,
                target_size=size,
                extent=extent,
                activation=processor.class_activation,
                threshold=AP_SCORE_THRESHOLD,
                mask_threshold=processor.mask_threshold,
                allowed_labels=self.thing_label_ids,
            )
            self.average_precision.update([_detections(candidates)], [_instances(row, self.thing_label_ids)])

    def compute(self) -> dict[str, Any]:
        return self.average_precision.compute()


class PanopticScorer:
    def __init__(self, label_spec: LabelSpec) -> None:
        self.label_spec = label_spec
        self.quality = PanopticQuality(label_spec.thing_label_ids, label_spec.num_labels)
        self.mean_iou = MeanIoU(label_spec.num_labels, label_spec.ignore_index, void_index=VOID_LABEL)
        self.things = InstanceScorer(label_spec) if label_spec.thing_label_ids else None

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> None:
        results = processor.post_process_panoptic_segmentation(outputs, target_sizes=list(sizes))
        predictions = [{**result, "segmentation": result["segmentation"].cpu().numpy()} for result in results]
        self.quality.update(predictions, [panoptic_reference(row) for row in rows])
        self.mean_iou.update(
            [_class_map(prediction) for prediction in predictions],
            [semantic_reference(row, self.label_spec) for row in rows],
        )
        if self.things is not None:
            self.things.add(processor, outputs, sizes, rows)

    def compute(self) -> dict[str, Any]:
        result = {**self.quality.compute(), "mean_iou": self.mean_iou.compute()["mean_iou"]}
        if self.things is not None:
            average_precision = self.things.compute()
            result.update({name: average_precision[name] for name in AP_SUMMARY})
            result["map_per_category"] = average_precision["per_category"]
        return result


SCORERS: dict[str, type[SemanticScorer] | type[InstanceScorer] | type[PanopticScorer]] = {
    "semantic": SemanticScorer,
    "instance": InstanceScorer,
    "panoptic": PanopticScorer,
}


def _detections(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Instance candidates as an entry of `MaskAveragePrecision`."""
    return {
        "masks": [candidate["rle"] for candidate in candidates],
        "scores": np.array([candidate["score"] for candidate in candidates], dtype=np.float64),
        "labels": np.array([candidate["label_id"] for candidate in candidates], dtype=np.int64),
    }


def _instances(row: Row, thing_label_ids: Sequence[int]) -> dict[str, Any]:
    """The things of a data row as an entry of `MaskAveragePrecision`; their masks stay run-length codes."""
    things = [segment for segment in row["segments"] if segment["label_id"] in thing_label_ids]
    size = [row["height"], row["width"]]
    return {
        "masks": [{"size": size, "counts": thing["rle"]} for thing in things],
        "labels": np.array([thing["label_id"] for thing in things], dtype=np.int64),
        "iscrowd": np.array([thing["iscrowd"] for thing in things], dtype=bool),
        "area": np.array([thing["area"] for thing in things], dtype=np.float64),
    }


def _class_map(prediction: dict[str, Any]) -> np.ndarray:
    """(H, W) int64 label ids of a panoptic result; VOID_LABEL where no segment is."""
    segments = prediction["segments_info"]
    labels = np.array([segment["label_id"] for segment in segments], dtype=np.int64)
    return fill_segments(prediction["segmentation"], [segment["id"] for segment in segments], labels, VOID_LABEL)


def _read_images(data: SegmentationData, indices: Iterable[int], on_bad_sample: str) -> dict[int, np.ndarray]:
    """Images by index; with "skip" without those that cannot be read."""
    images = {}
    for index in indices:
        try:
            images[index] = data.image(index)
        except ValueError as error:
            if on_bad_sample == "raise":
                raise
            logger.warning("skipped: %s", error)
    return images


def _check_arguments(
    data: SegmentationData, task: str, batch_size: int, limit: int | None, on_bad_sample: str
) -> None:
    """Raises ValueError for arguments of `evaluate` that cannot be used."""
    if task not in SCORERS:
        raise ValueError(f"task must be one of {sorted(SCORERS)}, got {task!r}")
    if data.task not in (task, "panoptic"):
        raise ValueError(f"data is loaded for task {data.task!r} but task is {task!r}: load it with task={task!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_on_bad_sample(on_bad_sample)
    if len(data) < 1 or (limit is not None and limit < 1):
        raise ValueError(f"there is nothing to evaluate: data has {len(data)} images and limit is {limit}")


def _check_classes(config: Any, processor: Any, label_spec: LabelSpec, task: str) -> None:
    """Raises ValueError where model or processor mean other classes than the data."""
    if processor.task is not None and processor.task != config.task:
        raise ValueError(f"the processor's task is {processor.task!r} but the model's is {config.task!r}")
    for holder, settings in (("model", config), ("processor", processor)):
        names = settings.id2label
        if names is None:
            continue
        if len(names) != label_spec.num_labels:
            raise ValueError(f"the {holder} has {len(names)} classes but the data {label_spec.num_labels}")
        ordered = [str(names[label]) for label in sorted(names, key=int)]
        expected = [label_spec.id2label[label] for label in sorted(label_spec.id2label)]
        if ordered != expected and sorted(ordered) == sorted(expected):
            raise ValueError(f"the {holder} has the data's classes in another order: {ordered}, data: {expected}")
        things = sorted(int(label) for label in settings.thing_label_ids or ())
        if task == "panoptic" and things != sorted(label_spec.thing_label_ids):
            raise ValueError(
                f"the {holder}'s thing_label_ids are {things} but the data's {sorted(label_spec.thing_label_ids)}"
            )


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode it had (frozen norms stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
