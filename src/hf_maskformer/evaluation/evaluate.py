"""Runs a model over a data set and returns the metrics of its task, at the original size of every image.

What `evaluate` returns is one flat dict:

- semantic: the keys of `MeanIoU`;
- instance: those of `MaskAveragePrecision`;
- panoptic: those of `PanopticQuality`, `mean_iou` of the merged class map and, where there are thing classes, `map`,
  `map_50`, `map_75`, `map_small`, `map_medium`, `map_large` and `map_per_category` of the thing instances;
- with `boundary` also: semantic the keys of `BoundaryIoU`; instance `boundary_map`, `boundary_map_50`, ... and
  `per_category_boundary_map`; panoptic `boundary_pq`, `boundary_sq`, ... and `per_category_boundary_pq`;
- where images were skipped, `skipped`: the number of those that could not be read among the images looked at (see
  `limit`), and of all that were left out when the data was indexed, whatever the limit. Rows that a stream leaves out
  are not among them; the log names them.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm.auto import tqdm

from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.evaluation.class_agreement import check_class_names
from hf_maskformer.evaluation.details import EvaluationDetails
from hf_maskformer.evaluation.scorers import SCORERS, Row, Scorer
from hf_maskformer.model.image_conversion import runs_of_one_canvas
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.processor_settings import check_merge

ALL_IMAGES = (0, 1)  # one shard of one

logger = logging.getLogger(__name__)


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
    *,
    boundary: bool = False,
    details: EvaluationDetails | None = None,
    ignore_class_names: bool = False,
    across_processes: bool = False,
    merge: str | None = None,
) -> dict[str, Any]:
    """Metrics of `model` on `data`; their keys stand at the head of this module.

    Images go through the processor at its own size, predictions are resized to the original image and compared there
    with the untouched reference. The model is moved to `device` and runs in eval mode; the mode of each of its modules
    is put back, also after an error. Instances are ranked by score without a score threshold; semantic and panoptic
    results use the processor's stored thresholds.

    Which classes are things comes from the data; a processor that stores it (ours do, those of official checkpoints
    do not) must agree with it. How class names are compared: `check_class_names`.

    Args:
        model: a `HfMaskFormerForUniversalSegmentation`.
        processor: its image processor; not changed.
        data: what `hf_maskformer.data.load.load` returned, loaded for the same task or for panoptic, which holds all;
            streamed data is read once, from first to last.
        task: "semantic", "instance" or "panoptic"; None takes the processor's, or else the data's.
        batch_size: images per forward pass, at most: images that a processor without a canvas pads to different sizes
            go through alone, so that no result depends on the batch.
        device: where the model runs.
        progress: show a progress bar.
        limit: evaluate the first `limit` images only, of those that are in the index.
        on_bad_sample: "raise" the ValueError of an image that cannot be read, or "skip" it with a warning.
        boundary: measure the boundaries of the masks too; slower.
        details: filled with the confusion of the classes, the score of every image and the worst images.
        ignore_class_names: take class k of the model for class k of the data whatever their names.
        across_processes: every process of `torch.distributed`'s group, which must exist, scores its own share of the
            images; each returns the metrics of all. False: this process scores all images.
        merge: how masks become panoptic segments, "argmax" or "mask_wise"; None takes the processor's. The thresholds
            stay the stored ones.

    Raises:
        ValueError: no (readable) images, an unknown task or one the data has no classes for, an unknown merge or one
            for another task, or model, processor and data disagree on task or classes.
        FloatingPointError: the model's outputs are not finite; names the images of the batch.
    """
    task = task or processor.task or data.task
    check_arguments(data, task, batch_size, limit, on_bad_sample)
    check_agreement_with_data(model.config, processor, data.label_spec, task, ignore_class_names)
    if merge is not None:
        check_merge(merge, task)
        processor = copy.copy(processor)
        processor.panoptic_merge = merge
    if details is not None:
        details.clear()
    score = Score(task, data.label_spec, boundary=boundary, details=details)
    shard = (distributed.get_rank(), distributed.get_world_size()) if across_processes else ALL_IMAGES
    score_images(
        model, processor, data, score, batch_size, device, progress and shard[0] == 0, limit, on_bad_sample, shard
    )
    return (gathered(score) if across_processes else score).compute()


class Score:
    """The state of an evaluation, to be merged when several processes or calls each see a part of the data.

    Merging the parts of neighbouring shards in their order gives the figures of one pass: `MaskAveragePrecision` ranks
    detections of equal score in the order of their images.
    """

    def __init__(
        self, task: str, label_spec: LabelSpec, *, boundary: bool = False, details: EvaluationDetails | None = None
    ) -> None:
        self.settings = (task, label_spec, boundary)
        self.scorer: Scorer = SCORERS[task](label_spec, boundary=boundary, details=details is not None)
        self.details = details
        self.images = 0  # scored
        self.skipped = 0
        if details is not None:
            details.score_name = self.scorer.score_name

    def add(self, processor: Any, outputs: Any, sizes: Sequence[tuple[int, int]], rows: Mapping[int, Row]) -> None:
        """One batch of outputs, and the rows of its images by their place in the data."""
        results = self.scorer.add(processor, outputs, sizes, list(rows.values()))
        self.images += len(rows)
        if self.details is not None:
            for (index, row), result in zip(rows.items(), results, strict=True):
                self.details.add(index, row, result)

    def add_unread(self, index: int | None, file_name: str) -> None:
        """An image that is skipped; index None: it was left out when the data was indexed."""
        self.skipped += 1
        if self.details is not None:
            self.details.add_unread(index, file_name)

    def merge(self, other: "Score") -> "Score":
        """Adds another part of the same evaluation."""
        if self.settings != other.settings or (self.details is None) != (other.details is None):
            raise ValueError("only parts of one evaluation (task, classes, boundary and details alike) can be merged")
        self.scorer.merge(other.scorer)
        self.images += other.images
        self.skipped += other.skipped
        if self.details is not None and other.details is not None:
            self.details.merge(other.details)
        return self

    def compute(self) -> dict[str, Any]:
        """The metrics; also completes `details`.

        Raises:
            ValueError: no image was scored.
        """
        if not self.images:
            raise ValueError(
                f"none of the {self.skipped} images can be read" if self.skipped else "data has no images"
            )
        if self.details is not None:
            self.details.complete(self.scorer.confusion())
        return {**self.scorer.compute(), **({"skipped": self.skipped} if self.skipped else {})}


def score_images(
    model: Any,
    processor: Any,
    data: SegmentationData,
    score: Score,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: bool = False,
    limit: int | None = None,
    on_bad_sample: str = "raise",
    shard: tuple[int, int] = ALL_IMAGES,
) -> None:
    """Adds the images of `shard` (number, count of shards) to `score`; the other arguments as in `evaluate`.

    The first shard also reports the images that were left out when the data was indexed.
    """
    if shard[0] == 0:
        for problem in data.left_out:
            score.add_unread(None, problem.file)
    task = score.settings[0]
    processor = copy.copy(processor)
    processor.task = None  # no post-processing method is hidden: panoptic evaluation also needs the instances
    if processor.thing_label_ids is None:
        processor.thing_label_ids = data.label_spec.thing_label_ids
    model.to(device)
    rows = numbered_rows(data, limit, shard)
    bar = tqdm(total=_length(data, limit, shard), disable=not progress, unit="image", desc=f"evaluate {task}")
    with bar, _eval_mode(model), torch.inference_mode():
        while batch := dict(islice(rows, batch_size)):
            images = _read_images(data, batch, on_bad_sample)
            for index in sorted(batch.keys() - images.keys()):
                score.add_unread(index, batch[index]["file_name"])
            numbers, sizes = list(images), [(image.shape[0], image.shape[1]) for image in images.values()]
            for run in runs_of_one_canvas(processor, sizes):
                inputs = processor(images=[images[index] for index in numbers[run]], return_tensors="pt")
                outputs = model(
                    pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device)
                )
                scored = {index: batch[index] for index in numbers[run]}
                with _named_images(scored.values()):
                    score.add(processor, outputs, sizes[run], scored)
            bar.update(len(batch))


def gathered(score: Score) -> Score:
    """The merged score of all processes, on every process. The caller's `details` are the merged ones."""
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, score)
    if score.details is not None:
        score.details.clear()
    task, label_spec, boundary = score.settings
    merged = Score(task, label_spec, boundary=boundary, details=score.details)
    for part in parts:
        merged.merge(part)
    return merged


def numbered_rows(data: SegmentationData, limit: int | None, shard: tuple[int, int]) -> Iterator[tuple[int, Row]]:
    """Rows of a shard with their place in the data: neighbours; of streamed data, whose length is not known, every
    n-th."""
    number, count = shard
    if data.streaming:
        for index, row in enumerate(islice(data.rows(), limit)):
            if index % count == number:
                yield index, row
        return
    for index in _shard_range(data, limit, shard):
        yield index, data.row(index)


def _shard_range(data: SegmentationData, limit: int | None, shard: tuple[int, int]) -> range:
    length = len(data) if limit is None else min(limit, len(data))
    number, count = shard
    return range(length * number // count, length * (number + 1) // count)


def _length(data: SegmentationData, limit: int | None, shard: tuple[int, int]) -> int | None:
    """Images of a shard, for the progress bar; None if not known."""
    if data.streaming:
        return None
    return len(_shard_range(data, limit, shard))


def _read_images(data: SegmentationData, rows: Mapping[int, Row], on_bad_sample: str) -> dict[int, np.ndarray]:
    """Images by index; with "skip" without those that cannot be read."""
    images = {}
    for index, row in rows.items():
        try:
            images[index] = data.row_image(row)
        except ValueError as error:
            if on_bad_sample == "raise":
                raise
            logger.warning("skipped: %s", error)
    return images


@contextmanager
def _named_images(rows: Iterable[Row]) -> Iterator[None]:
    """Names the images of a batch whose outputs are not finite."""
    try:
        yield
    except FloatingPointError as error:
        names = ", ".join(row["file_name"] for row in rows)
        raise FloatingPointError(f"{error} The batch is: {names}") from error


def check_arguments(data: SegmentationData, task: str, batch_size: int, limit: int | None, on_bad_sample: str) -> None:
    """Raises ValueError for arguments of `evaluate` that cannot be used."""
    if task not in SCORERS:
        raise ValueError(f"task must be one of {sorted(SCORERS)}, got {task!r}")
    if data.task not in (task, "panoptic"):
        raise ValueError(f"data is loaded for task {data.task!r} but task is {task!r}: load it with task={task!r}")
    if task == "instance" and not data.label_spec.thing_label_ids:
        raise ValueError("task 'instance' needs thing classes, but all classes of the data are stuff: use 'semantic'")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_on_bad_sample(on_bad_sample)
    if (limit is not None and limit < 1) or (not data.streaming and len(data) < 1):
        length = "unknown many" if data.streaming else len(data)
        raise ValueError(f"there is nothing to evaluate: data has {length} images and limit is {limit}")


def check_agreement_with_data(
    config: Any, processor: Any, label_spec: LabelSpec, task: str, ignore_names: bool = False
) -> None:
    """Raises ValueError where model or processor mean other classes than the data."""
    if processor.task is not None and processor.task != config.task:
        raise ValueError(f"the processor's task is {processor.task!r} but the model's is {config.task!r}")
    for holder, settings in (("model", config), ("processor", processor)):
        if settings.id2label is not None:
            check_class_names(holder, settings.id2label, label_spec, ignore_names)
    # A model's config always has thing ids, a default where none were given; a processor only those that were stored.
    if task == "panoptic" and processor.thing_label_ids is not None:
        for holder, settings in (("model", config), ("processor", processor)):
            things = sorted(int(label) for label in settings.thing_label_ids or ())
            if things != sorted(label_spec.thing_label_ids):
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
