"""Training: one loop over Accelerate, read from top to bottom.

Each optimizer step reads a whole accumulation window before its first backward, because the losses are local sums over
the window's global counts (`model.loss_normalizer`): the gradient is then the same for 8 images in one pass, in
4 accumulated passes of 2, and on 2 processes with 4 each. Random numbers of a step depend on (seed, step, process) and
the data order on (seed, position), so a resumed run repeats what an uninterrupted one does. Streamed data has an order
for each number of processes and of reader processes.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.stream import TrainingStream
from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.checkpoint import load_optimizer, load_state
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.data_stream import MicroBatches, StreamDataset, micro_batches, streamed_batches
from hf_maskformer.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from hf_maskformer.training.run import Keeper, open_run
from hf_maskformer.training.setup import build_augmentation, build_model, load_splits, open_epoch, training_processor
from hf_maskformer.training.trackers import ProgressBar, RunningMean


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, evaluate and save under `config.output_dir`; returns what RUN/metrics.json holds.

    Raises:
        ValueError: bad options or data (naming the file), or a run that is already there without `resume`.
        FloatingPointError: a loss or gradient that is not finite, naming the images of the step; checkpoints stay.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps, mixed_precision=config.mixed_precision
    )
    run = Path(config.output_dir)
    checkpoint = open_run(run, config, accelerator)
    train_data, val_data = load_splits(config)
    set_seed(config.seed)
    model, processor = build_model(config, train_data, checkpoint)
    optimizer, state = open_optimizer(config, model, accelerator, checkpoint)
    batches = open_batches(config, train_data, processor, accelerator, first_step=state.step)
    images_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_images = None if train_data.streaming else len(train_data)
    budget = Budget(config, num_images=num_images, images_per_step=images_per_step)
    model, optimizer = accelerator.prepare(model, optimizer)
    keeper = Keeper(run, config, accelerator, model, processor, optimizer, val_data, resume_step=state.step)

    model.train()
    means = RunningMean()
    with ProgressBar(enabled=accelerator.is_main_process) as bar:
        while budget.progress(state) < 1.0:
            if budget.evaluation_due(state):
                keeper.evaluate(state)
            started = time.perf_counter()
            seed_step(config.seed, state.step, accelerator.process_index)
            window = [move(next(batches), accelerator.device) for _ in range(config.gradient_accumulation_steps)]
            data_seconds = time.perf_counter() - started

            factor = learning_rate_factor(
                config.schedule, step=state.step, progress=budget.progress(state), warmup_steps=config.warmup_steps
            )
            set_learning_rate(optimizer.param_groups, factor)
            values = training_step(
                accelerator, model, optimizer, window, step=state.step, max_grad_norm=config.max_grad_norm
            )

            state.step += 1
            seconds = time.perf_counter() - started
            # Every process must leave the loop at the same step: the main process's clock counts.
            state.seconds += shared_float(seconds, accelerator)
            means.add({**values, "seconds_per_step": seconds, "data_seconds": data_seconds})
            if state.step % config.log_every == 0:
                logged = means.pop()
                logged["images_per_second"] = images_per_step / logged["seconds_per_step"]
                logged["learning_rate"] = config.learning_rate * factor
                keeper.log(state, progress=budget.progress(state), **logged)
                bar.show(budget.progress(state), step=str(state.step), loss=f"{logged['loss']:.3f}")
            if state.step % config.checkpoint_every == 0:
                keeper.save_checkpoint(state)
    del batches  # ends the reader processes
    return keeper.finish(state)


def open_optimizer(
    config: TrainConfig, model: torch.nn.Module, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[torch.optim.Optimizer, TrainState]:
    """The optimizer and where the run stands; both, and the fp16 scaler, as in the checkpoint where there is one."""
    optimizer = build_optimizer(
        model,
        learning_rate=config.learning_rate,
        backbone_multiplier=config.backbone_learning_rate_multiplier,
        weight_decay=config.weight_decay,
    )
    if checkpoint is None:
        return optimizer, TrainState()
    load_optimizer(checkpoint, optimizer)
    stored = load_state(checkpoint)
    if accelerator.scaler is not None and stored.get("scaler"):
        accelerator.scaler.load_state_dict(stored["scaler"])
    return optimizer, TrainState(**stored["progress"])


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    window: list[dict[str, Any]],
    *,
    step: int,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Forward and backward over one accumulation window, clip, update; the loss and its terms over all processes."""
    labels = [ids for batch in window for ids in batch["class_labels"]]
    normalizer = accelerator.unwrap_model(model).loss_normalizer(labels, divisor=len(window))
    names: list[str] = []
    total = torch.zeros((), device=accelerator.device)
    try:
        for position, batch in enumerate(window):
            last = position == len(window) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                outputs = model(**model_inputs(batch), loss_normalizer=normalizer)
                accelerator.backward(outputs.loss)
            names = ["loss", *outputs.loss_dict]
            terms = torch.stack([outputs.loss.detach(), *(term.detach() for term in outputs.loss_dict.values())])
            total = total + terms / len(window)
        values = dict(zip(names, accelerator.reduce(total, reduction="mean").tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']}")
        # Clipping to infinity changes nothing and still gives the norm.
        limit = math.inf if max_grad_norm is None else max_grad_norm
        norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
        # The fp16 scaler itself passes over steps whose scaled gradients overflow.
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise FloatingPointError(f"the gradient's norm is {norm}")
        values["grad_norm"] = norm
    except FloatingPointError as error:
        images = [image_id for batch in window for image_id in batch["image_ids"]]
        raise FloatingPointError(f"step {step}: {error}; the images of this step are {images}") from error
    optimizer.step()
    optimizer.zero_grad()
    return values


def open_batches(
    config: TrainConfig, data: Any, processor: Any, accelerator: Accelerator, *, first_step: int
) -> Iterator[dict[str, Any]]:
    """This process's augmented and collated batches, from `first_step` on."""
    augmentation = build_augmentation(config, processor)
    collate = Collator(training_processor(processor, augmentation.crop_size))
    if data.streaming:
        samples = TrainingStream(
            data,
            augmentation,
            config.seed,
            config.on_bad_sample,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return streamed_batches(
            samples,
            collate,
            batch_size=config.batch_size,
            first_batch=first_step * config.gradient_accumulation_steps,
            num_workers=config.num_workers,
        )
    stream = StreamDataset(
        partial(open_epoch, data, augmentation, config.seed, config.on_bad_sample), length=len(data), seed=config.seed
    )
    sampler = MicroBatches(
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process=accelerator.process_index,
        first_step=first_step,
    )
    return micro_batches(stream, sampler, collate, num_workers=config.num_workers)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout and loss points of one step, so that a resumed run needs no stored generator state."""
    set_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))


def move(batch: Any, device: torch.device) -> dict[str, Any]:
    """A batch with its tensors, and the tensors in its lists, on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return [moved(item) for item in value] if isinstance(value, list) else value

    return {name: moved(value) for name, value in batch.items()}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("pixel_values", "pixel_mask", "mask_labels", "class_labels")}


def shared_float(value: float, accelerator: Accelerator) -> float:
    """The main process's value on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]
