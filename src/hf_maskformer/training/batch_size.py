"""The largest batch that fits into the memory (`batch_size: auto`), found by running training steps.

The steps are the worst that the run can meet: whole crops, and as many targets as the fullest images of the data set
have. Sizes are tried from the smallest on, until one does not fit. Model and random state are afterwards what they
were before, so that the run is the one of which the found number is given.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from hf_maskformer.data.sample import group_by_task
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.training.checkpoint import write_text
from hf_maskformer.training.config import CONFIG_FILE, TrainConfig
from hf_maskformer.training.optimizer import build_optimizer
from hf_maskformer.training.setup import build_augmentation
from hf_maskformer.training.step_memory import free_memory, memory_check

MOST_IMAGES = 1024  # per process; more than any published recipe uses
DRAWN_IMAGES = 64  # drawn to count what is in them
SIZE_DIVISOR = 32

logger = logging.getLogger(__name__)


def known_batch_size(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """`config` with what can be said before a model is there, which `accelerator` is told too.

    A resumed run takes the number that "auto" was when it was begun, and `images_per_step` becomes accumulation steps.

    Raises:
        ValueError: the batches do not divide `images_per_step`, or `gradient_accumulation_steps` contradicts it.
    """
    stored = Path(config.output_dir) / CONFIG_FILE
    if config.batch_size == "auto" and config.resume and stored.is_file():
        values = json.loads(stored.read_text())
        config = dataclasses.replace(config, batch_size=values["batch_size"])
    if config.batch_size == "auto":
        candidates(config.images_per_step, accelerator.num_processes, most=1)  # raises where none can be
        if config.images_per_step is not None and config.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but images_per_step "
                f"{config.images_per_step} decides it: leave one of them out"
            )
        return config
    return with_number(config, config.batch_size, accelerator)


def with_number(config: TrainConfig, batch_size: int, accelerator: Accelerator) -> TrainConfig:
    """`config` with this batch size and the accumulation steps that make up `images_per_step`."""
    given = steps = config.gradient_accumulation_steps
    if config.images_per_step is not None:
        together = batch_size * accelerator.num_processes
        steps = config.images_per_step // together
        if steps * together != config.images_per_step:
            raise ValueError(
                f"images_per_step is {config.images_per_step}, but {accelerator.num_processes} processes with "
                f"batch_size {batch_size} take {together} images at a time: choose a multiple of {together}"
            )
        if given not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps is {given}, but images_per_step {config.images_per_step} makes it "
                f"{steps}: leave one of them out"
            )
    accelerator.gradient_accumulation_steps = steps
    return dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=steps)


def found_batch_size(
    config: TrainConfig, model: nn.Module, processor: Any, data: SegmentationData, accelerator: Accelerator
) -> TrainConfig:
    """`config` with a number for "auto", the same on all processes; it is stored in the run's configuration.

    Sharded models are tried whole and compiled ones as they are, so that what is found fits there too. Every process
    must make this call.

    Raises:
        ValueError: not even one image fits.
    """
    if config.batch_size != "auto":
        return config
    most = MOST_IMAGES if data.streaming else max(1, len(data) // accelerator.num_processes)
    sizes = candidates(config.images_per_step, accelerator.num_processes, most=min(most, MOST_IMAGES))
    with unchanged(model, accelerator.device):
        step = TrialSteps(config, model, processor, data, accelerator, most=sizes[-1])
        found = largest_fitting(sizes, everywhere(memory_check(step, accelerator), accelerator))
        del step  # and its optimizer
    config = with_number(config, found, accelerator)
    if accelerator.is_main_process:
        write_text(Path(config.output_dir) / CONFIG_FILE, json.dumps(config.to_dict(), indent=2))
    logger.info(
        "batch_size auto: %d images fit into the memory of a process; %d processes and %d accumulation steps make %d "
        "images per optimizer step",
        *(found, accelerator.num_processes, config.gradient_accumulation_steps),
        found * accelerator.num_processes * config.gradient_accumulation_steps,
    )
    return config


def candidates(images_per_step: int | None, num_processes: int, *, most: int) -> list[int]:
    """The sizes to try, rising: divisors of what one process has of `images_per_step`, else 1, 2, 3, 4, 6, 8, 12, ...

    Raises:
        ValueError: the processes cannot share `images_per_step` evenly.
    """
    if images_per_step is None:
        sizes = {factor * 2**power for factor in (1, 3) for power in range(most.bit_length())}
        return sorted(size for size in sizes if size <= most)
    share, rest = divmod(images_per_step, num_processes)
    if rest:
        raise ValueError(
            f"images_per_step is {images_per_step}; it must be a multiple of the {num_processes} processes"
        )
    return [size for size in range(1, min(share, most) + 1) if share % size == 0]


def everywhere(fits: Callable[[int], bool], accelerator: Accelerator) -> Callable[[int], bool]:
    """Whether a size fits on all processes, which all ask together."""

    def agreed(size: int) -> bool:
        fitting = torch.tensor(float(fits(size)), device=accelerator.device)
        return float(accelerator.reduce(fitting, reduction="sum")) == accelerator.num_processes

    return agreed


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of the rising sizes before the first that does not fit.

    Raises:
        ValueError: the first one does not fit.
    """
    found = None
    for size in sizes:
        if not fits(size):
            break
        found = size
    if found is None:
        raise ValueError(
            f"batch_size auto: not even {sizes[0]} image fits into the memory. Choose a smaller crop_size, "
            "gradient_checkpointing, mixed_precision bf16, or a smaller preset"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the worst kind
# ---------------------------------------------------------------------------------------------------------------------


class TrialSteps:
    """Training steps on made-up batches, with gradients kept between the forward passes as accumulation keeps them."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        processor: Any,
        data: SegmentationData,
        accelerator: Accelerator,
        *,
        most: int,
    ) -> None:
        self.model, self.accelerator = model, accelerator
        augmentation = build_augmentation(config, processor)
        side = -(-max(dict(processor.size).values()) // SIZE_DIVISOR) * SIZE_DIVISOR
        self.canvas = augmentation.crop_size or (side, side)
        pasted = 2 if augmentation.copy_paste_probability else 1
        counts = fullest_images(data, most) or [model.config.num_queries]
        if data.task == "semantic":  # a class is one target
            counts = [min(count, model.config.num_labels) for count in counts]
        self.counts = [pasted * count for count in counts]
        # A learning rate of 0: the weights stay near those that training begins with.
        self.optimizer = build_optimizer(model, learning_rate=0.0, backbone_multiplier=1.0, weight_decay=0.0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        copies = (config.ema_decay is not None) + (accelerator.num_processes > 1)  # the average; what is sent around
        self.further = [torch.ones_like(parameter) for parameter in trained for _ in range(copies)]

    def __call__(self, size: int) -> None:
        """One step with `size` images."""
        batch = worst_batch(size, self.counts, self.canvas, self.model.config, self.accelerator.device)
        normalizer = self.model.loss_normalizer(batch["class_labels"], reduce=False)
        with self.accelerator.autocast():
            loss = self.model(**batch, loss_normalizer=normalizer).loss
        loss.backward()
        self.optimizer.step()


def fullest_images(data: SegmentationData, most: int) -> list[int]:
    """The numbers of targets in up to `most` images, those with the most segments first; none of streamed data."""
    if data.streaming:
        return []
    counts = []
    for index in with_most_segments(data, most):
        row = data.row(index)["segments"]
        labels = np.array([segment["label_id"] for segment in row], dtype=np.int64)
        crowd = np.array([segment["iscrowd"] for segment in row], dtype=bool)
        counts.append(len(group_by_task(labels, crowd, data.task, data.label_spec)[2]))
    return sorted(counts, reverse=True)


def with_most_segments(data: SegmentationData, most: int) -> list[int]:
    """Numbers of up to `most` images: those with the most segments; of drawn scenes, all alike, the first."""
    if not isinstance(data.dataset, Dataset):
        return list(range(min(most, DRAWN_IMAGES, len(data))))
    segments = data.dataset.select_columns(["segments"]).with_format("arrow")[:]["segments"]
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in segments.chunks])
    return np.argsort(-lengths, kind="stable")[:most].tolist()


def worst_batch(
    size: int, counts: Sequence[int], canvas: tuple[int, int], config: Any, device: torch.device
) -> dict[str, Any]:
    """Noise with one padded column, image k with `counts[k]` targets (the last count again for further images)."""
    height, width = canvas
    valid = torch.ones(size, height, width, dtype=torch.int64, device=device)
    valid[:, :, -1] = 0
    numbers = [counts[min(image, len(counts) - 1)] for image in range(size)]
    masks = [torch.zeros(number, height, width, dtype=torch.bool, device=device) for number in numbers]
    for image_masks in masks:
        image_masks[:, : height // 2, : width // 2] = True
    return {
        "pixel_values": torch.randn(size, config.num_channels, height, width, device=device),
        "pixel_mask": valid,
        "mask_labels": masks,
        "class_labels": [torch.arange(number, device=device) % config.num_labels for number in numbers],
    }


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is in training mode on `device`; afterwards it, and all random numbers, are as before."""
    values: list[Tensor] = [*model.parameters(), *model.buffers()]
    before = [value.detach().to("cpu", copy=True) for value in values]
    home = values[0].device
    modes = [(module, module.training) for module in model.modules()]
    python, array = random.getstate(), np.random.get_state()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            model.to(device).train()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        model.zero_grad(set_to_none=True)
        model.to(home)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for value, old in zip([*model.parameters(), *model.buffers()], before, strict=True):
                value.copy_(old)
        free_memory(device)
