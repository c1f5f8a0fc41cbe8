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
from accelerate.utils import set_seed

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.data.stream import TrainingStream
from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.checkpoint import load_average, load_optimizer, load_state
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.data_stream import MicroBatches, StreamDataset, micro_batches, streamed_batches
from hf_maskformer.training.ema import WeightAverage
from hf_maskformer.training.failure import OTHER_PROCESS, FailureDiary, NonFiniteStep
from hf_maskformer.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from hf_maskformer.training.run import Keeper, open_run, shared_float
from hf_maskformer.training.setup import build_augmentation, build_model, load_splits, open_epoch, training_processor
from hf_maskformer.training.trackers import ProgressBar, RunningMean, tracker_options


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, evaluate and save under `config.output_dir`; returns what RUN/metrics.json holds.

    Raises:
        ValueError: bad options or data (naming the file), or a run that is already there without `resume`.
        FloatingPointError: a loss or gradient that is not finite, naming the images of the step, which is written to
            RUN/failures; checkpoints stay. With `on_nonfinite="skip"` only after 10 such steps in a row.
    """
    run = Path(config.output_dir)
    accelerator = open_accelerator(config)
    checkpoint = open_run(run, config, accelerator)
    train_data, val_data = load_splits(config)
    set_seed(config.seed)
    model, processor = open_model(config, train_data, checkpoint)
    optimizer, state = open_optimizer(config, model, accelerator, checkpoint)
    batches = open_batches(config, train_data, processor, accelerator, first_step=state.step)
    images_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    budget = Budget(config, num_images=dataset_length(train_data), images_per_step=images_per_step)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    average = open_average(config, accelerator.unwrap_model(model), checkpoint)
    keeper = Keeper(
        run, config, accelerator, model, processor, optimizer, val_data, average=average, resume_step=state.step
    )

    diary, means = FailureDiary(keeper), RunningMean()
    with ProgressBar(enabled=accelerator.is_main_process) as bar:
        while not budget.spent(state):
            if budget.evaluation_due(state):
                keeper.evaluate(state)
                if budget.stopped_early(state):
                    break
            started = time.perf_counter()
            seed_step(config.seed, state.step, accelerator.process_index)
            window = [move(next(batches), accelerator.device) for _ in range(config.gradient_accumulation_steps)]
            data_seconds = time.perf_counter() - started
            factor = schedule_factor(config, step=state.step, progress=budget.progress(state))
            set_learning_rate(optimizer.param_groups, factor)
            take_step = partial(training_step, accelerator, model, optimizer, window)
            values = diary.watch(
                state, window, partial(take_step, step=state.step, max_grad_norm=config.max_grad_norm)
            )

            state.step += 1
            if average is not None and values is not None:
                average.update(accelerator.unwrap_model(model), state.step)
            seconds = time.perf_counter() - started
            # Every process must leave the loop at the same step: the main process's clock counts.
            state.seconds += shared_float(seconds, accelerator)
            state.data_seconds += data_seconds
            if values is not None:
                means.add({**values, "seconds_per_step": seconds, "data_seconds": data_seconds})
            if means.count and state.step % config.log_every == 0:
                logged = logged_values(means, images_per_step, config.learning_rate * factor)
                keeper.log(state, progress=budget.progress(state), **logged)
                bar.show(budget.progress(state), step=str(state.step), loss=f"{logged['loss']:.3f}")
            if state.step % config.checkpoint_every == 0:
                keeper.save_checkpoint(state)
    del batches  # ends the reader processes
    return keeper.finish(state)


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as the options ask for it; the trackers write below the run."""
    return Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        **tracker_options(config.tracker, Path(config.output_dir)),
    )


def open_model(config: TrainConfig, data: SegmentationData, checkpoint: Path | None) -> tuple[Any, Any]:
    """`build_model`, with activation checkpointing where it is asked for."""
    model, processor = build_model(config, data, checkpoint)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model, processor


def dataset_length(data: SegmentationData) -> int | None:
    """Images of an epoch; a stream does not know."""
    return None if data.streaming else len(data)


def logged_values(means: RunningMean, images_per_step: int, learning_rate: float) -> dict[str, float]:
    """What is logged of the steps since the last line."""
    logged = means.pop()
    logged["images_per_second"] = images_per_step / logged["seconds_per_step"]
    logged["data_wait_share"] = logged["data_seconds"] / logged["seconds_per_step"]
    logged["learning_rate"] = learning_rate
    return logged


def open_optimizer(
    config: TrainConfig, model: torch.nn.Module, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[torch.optim.Optimizer, TrainState]:
    """The optimizer and where the run stands; both, and the fp16 scaler, as in the checkpoint where there is one."""
    optimizer = build_optimizer(
        model,
        learning_rate=config.learning_rate,
        backbone_multiplier=config.backbone_learning_rate_multiplier,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    if checkpoint is None:
        return optimizer, TrainState()
    load_optimizer(checkpoint, optimizer)
    stored = load_state(checkpoint)
    if accelerator.scaler is not None and stored.get("scaler"):
        accelerator.scaler.load_state_dict(stored["scaler"])
    return optimizer, TrainState(**stored["progress"])


def schedule_factor(config: TrainConfig, *, step: int, progress: float) -> float:
    """`learning_rate_factor` with the schedule of `config`."""
    return learning_rate_factor(
        config.schedule,
        step=step,
        progress=progress,
        warmup_steps=config.warmup_steps,
        schedule_steps=config.schedule_steps,
    )


def checkpoint_activations(model: Any) -> None:
    """Switch on the model's own gradient checkpointing."""
    # The name before transformers 5.23, deprecated since.
    old_name = not hasattr(model, "activation_checkpointing_enable")
    enable = model.gradient_checkpointing_enable if old_name else model.activation_checkpointing_enable
    enable({"use_reentrant": False})


def open_average(config: TrainConfig, model: torch.nn.Module, checkpoint: Path | None) -> WeightAverage | None:
    """The averaged weights as in the checkpoint, else as the model's; None without `ema_decay`."""
    if config.ema_decay is None:
        return None
    average = WeightAverage(model, config.ema_decay)
    if checkpoint is not None:
        average.load_state_dict(load_average(checkpoint))
    return average


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    window: list[dict[str, Any]],
    *,
    step: int,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Forward and backward over one accumulation window, clip, update; the loss and its terms over all processes.

    Raises:
        NonFiniteStep: a loss or the gradient is not finite; on every process, with the model as it was before.
    """
    labels = [ids for batch in window for ids in batch["class_labels"]]
    normalizer = accelerator.unwrap_model(model).loss_normalizer(labels, divisor=len(window))
    names: list[str] = []
    passes: list[torch.Tensor] = []  # the terms of this process's forward passes
    total = torch.zeros((), device=accelerator.device)
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        for position, batch in enumerate(window):
            last = position == len(window) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                outputs = forward_together(accelerator, model, batch, normalizer)
                accelerator.backward(outputs.loss)
            names = ["loss", *outputs.loss_dict]
            terms = torch.stack([outputs.loss.detach(), *(term.detach() for term in outputs.loss_dict.values())])
            passes.append(terms)
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
        leave_step(model, optimizer, buffers)
        named = [dict(zip(names, terms.tolist(), strict=True)) for terms in passes]
        raise NonFiniteStep(step, str(error), normalizer=normalizer, terms=named) from error
    optimizer.step()
    optimizer.zero_grad()
    return values


def forward_together(
    accelerator: Accelerator, model: torch.nn.Module, batch: dict[str, Any], normalizer: torch.Tensor
) -> Any:
    """One forward pass; a FloatingPointError on one process is one on all, which would else wait for its gradient.

    They agree in a hook inside the wrapped model, so that DDP prepares a backward pass on all processes or on none.
    """
    if accelerator.num_processes == 1:
        return model(**model_inputs(batch), loss_normalizer=normalizer)

    def agree(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        failed = accelerator.reduce(torch.tensor(float(outputs is None), device=accelerator.device))
        if failed > 0 and outputs is not None:
            raise FloatingPointError(OTHER_PROCESS)

    hook = accelerator.unwrap_model(model).register_forward_hook(agree, always_call=True)
    try:
        return model(**model_inputs(batch), loss_normalizer=normalizer)
    finally:
        hook.remove()


@torch.no_grad()
def leave_step(model: torch.nn.Module, optimizer: Any, buffers: list[torch.Tensor]) -> None:
    """Clear the gradients and put back the buffers that the step's forward passes changed (batch norm statistics)."""
    optimizer.zero_grad()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


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
