"""transformers' `Trainer` with this package's loss normaliser, batches and metrics.

The losses are local sums divided by the counts of a whole accumulation window. `HfMaskFormerTrainer` hands them to
each micro-batch; plain `Trainer` works with the same parts and is exact over processes, but normalises each
micro-batch by its own counts, so that with accumulation a mask in a micro-batch with few of them weighs more.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.sample import Sample, task_segments
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.evaluation.evaluate import Score, check_agreement_with_data, check_arguments
from hf_maskformer.model.outputs import HfMaskFormerForUniversalSegmentationOutput
from hf_maskformer.training.setup import training_processor


class HfMaskFormerTrainer(Trainer):
    """`Trainer` whose loss and gradient do not depend on how a window is cut into micro-batches and processes.

    Models with PEFT adapters work too. Everything but `get_batch_samples` is transformers' own.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of one optimizer step, each with the `loss_normalizer` (3,) of all of them.

        Raises:
            ValueError: one process with several GPUs (DataParallel), which would cut the normaliser in pieces.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs: start one process for each with `accelerate launch` or "
                "`torchrun`, or let CUDA_VISIBLE_DEVICES name one of them"
            )
        window, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = [ids for batch in window for ids in batch["class_labels"]]
        # Trainer divides each loss by the real length of the window, which is shorter at the end of an epoch.
        normalizer = self.accelerator.unwrap_model(self.model).loss_normalizer(labels, divisor=max(1, len(window)))
        return [{**batch, "loss_normalizer": normalizer} for batch in window], num_items


@dataclass(frozen=True)
class WholeImage:
    """A sample at its original size that is to be evaluated."""

    sample: Sample


class EvaluationDataset(Dataset[WholeImage]):
    """All images of `data` at their original size, in order: the `eval_dataset` of a Trainer.

    Raises:
        TypeError: the data is streamed.
    """

    def __init__(self, data: SegmentationData) -> None:
        self.data = data
        self._length = len(data)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> WholeImage:
        return WholeImage(self.data.sample(index))


class TrainerCollator:
    """The `data_collator` of a Trainer: the model's inputs and nothing else.

    Training samples, which augmentation has brought to their size, are padded to `crop_size`; each `WholeImage` is
    resized to the processor's own size, as `evaluate` does.

    Args:
        processor: the model's image processor.
        crop_size: (H, W) of the training augmentation; None pads to the largest image of a batch.
    """

    def __init__(self, processor: Any, crop_size: tuple[int, int] | None = None) -> None:
        self.processor = processor
        self.collate_crops = Collator(training_processor(processor, crop_size))

    def __call__(self, samples: Sequence[Sample | WholeImage]) -> dict[str, Any]:
        """`pixel_values` (B, C, H, W), `pixel_mask` (B, H, W), B `mask_labels` (N, H, W), B `class_labels` (N,).

        Raises:
            ValueError: samples of both kinds.
        """
        whole = [entry.sample for entry in samples if isinstance(entry, WholeImage)]
        crops = [entry for entry in samples if isinstance(entry, Sample)]
        if whole and crops:
            raise ValueError(f"a batch mixes {len(crops)} training samples and {len(whole)} whole images")
        if crops:
            batch = self.collate_crops(crops)
        else:
            batch = self.processor(
                images=[sample.image for sample in whole],
                masks=[sample.segments for sample in whole],
                class_labels=[sample.class_labels for sample in whole],
                return_tensors="pt",
            )
        return {name: batch[name] for name in ("pixel_values", "pixel_mask", "mask_labels", "class_labels")}


class TrainerMetrics:
    """The `compute_metrics` of a Trainer: what `evaluate` returns, at the original size of every image.

    It needs `batch_eval_metrics=True`, `eval_do_concat_batches=False`, `EvaluationDataset(data)` as `eval_dataset`,
    and one process (several evaluate with `hf-maskformer evaluate`). Only counts and match records are kept between
    batches.

    Args:
        model: the model that is trained, with or without adapters.
        processor: its image processor; not changed.
        data: what `EvaluationDataset` was given.
        task: "semantic", "instance" or "panoptic"; None takes the processor's, or else the data's.
        boundary: measure the boundaries of the masks too; slower.

    Raises:
        ValueError: model, processor and data disagree on task or classes, or there is nothing to evaluate.
    """

    def __init__(
        self, model: Any, processor: Any, data: SegmentationData, task: str | None = None, *, boundary: bool = False
    ) -> None:
        self.data = data
        self.task = task or processor.task or data.task
        self.boundary = boundary
        check_arguments(data, self.task, batch_size=1, limit=None, on_bad_sample="raise")
        check_agreement_with_data(model.config, processor, data.label_spec, self.task)
        self.processor = copy.copy(processor)
        self.processor.task = None  # no post-processing method is hidden: panoptic evaluation also needs the instances
        if self.processor.thing_label_ids is None:
            self.processor.thing_label_ids = data.label_spec.thing_label_ids
        self.reset()

    def reset(self) -> None:
        """Forgets the images seen so far: needed only after an evaluation that was broken off."""
        self.score = Score(self.task, self.data.label_spec, boundary=self.boundary)
        for problem in self.data.left_out:
            self.score.add_unread(None, problem.file)

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, Any]:
        """Adds one batch; with `compute_result`, which Trainer sets for the last one, returns the metrics.

        Raises:
            ValueError: the arguments of Trainer are not those above, or other images came than those of the data.
            FloatingPointError: the model's outputs are not finite; names the images of the batch.
        """
        if compute_result is None or not isinstance(prediction.label_ids, (tuple, list)):
            raise ValueError("TrainerMetrics needs batch_eval_metrics=True and the default label_names")
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError("TrainerMetrics works in one process; evaluate with `hf-maskformer evaluate` instead")
        try:
            self._add(prediction)
            if not compute_result:
                return {}
            if self.score.images != len(self.data):
                raise ValueError(f"{self.score.images} of the data's {len(self.data)} images were evaluated")
            metrics = self.score.compute()
        except (ValueError, FloatingPointError):
            self.reset()
            raise
        self.reset()
        return metrics

    def _add(self, prediction: EvalPrediction) -> None:
        outputs = model_output(prediction.predictions)
        class_labels = prediction.label_ids[1]  # label_names are (mask_labels, class_labels), as in forward
        first = self.score.images
        if first + len(class_labels) > len(self.data):
            raise ValueError(f"more images were evaluated than the data's {len(self.data)}")
        rows = {index: self.data.row(index) for index in range(first, first + len(class_labels))}
        for row, labels in zip(rows.values(), class_labels, strict=True):
            expected = iter(task_segments(row, self.data.task, self.data.label_spec)[1].tolist())
            # A mask may have lost its last pixel in the resize, so some of the expected ones may be missing.
            if not all(label in expected for label in labels.tolist()):
                raise ValueError(
                    f"{row['file_name']} has other classes than the image evaluated in its place: eval_dataset must "
                    "be EvaluationDataset(data) of the same data, in order"
                )
        try:
            sizes = [(row["height"], row["width"]) for row in rows.values()]
            self.score.add(self.processor, outputs, sizes, rows)
        except FloatingPointError as error:
            names = ", ".join(row["file_name"] for row in rows.values())
            raise FloatingPointError(f"{error} The batch is: {names}") from error


def model_output(predictions: Sequence[Any]) -> HfMaskFormerForUniversalSegmentationOutput:
    """The model's output from the values that Trainer made of it: those not None, in their order, without the loss.

    Raises:
        ValueError: they are not the class logits, mask logits and valid extents of our model.
    """
    tensors = [value for value in predictions if isinstance(value, torch.Tensor)]
    if [tensor.ndim for tensor in tensors[:3]] != [3, 4, 2]:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"the predictions have the shapes {shapes}; expected are class logits (B, Q, K + 1), mask logits "
            "(B, Q, h, w) and valid extents (B, 2), which a batch with pixel_mask gives"
        )
    class_logits, mask_logits, extent = tensors[:3]
    return HfMaskFormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits, valid_extent=extent
    )
