"""Training: one loop over Accelerate, read from top to bottom.

Each optimizer step reads a whole accumulation window before its first backward, because the losses are local sums over
the window's global counts (`model.loss_normalizer`): the gradient is then the same for 8 images in one pass, in
4 accumulated passes of 2, and on 2 processes with 4 each. Random numbers of a step depend on (seed, step, process) and
the data order on (seed, position), so a resumed run repeats what an uninterrupted one does. Streamed data has an order
for each number of processes and of reader processes.
"""

import time
from collections.abc import Iterator
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
from hf_maskformer.training.accelerator import check_machine, open_accelerator
from hf_maskformer.training.batch_size import found_batch_size, known_batch_size
from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.checkpoint import load_average, load_optimizer, load_state
from hf_maskformer.training.compilation import compile_parts
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.data_stream import MicroBatches, StreamDataset, micro_batches, streamed_batches
from hf_maskformer.training.ema import WeightAverage
from hf_maskformer.training.failure import FailureDiary
from hf_maskformer.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from hf_maskformer.training.publishing import check_publishing, publish_finished
from hf_maskformer.training.run import Keeper, open_run, shared_float
from hf_maskformer.training.setup import build_augmentation, build_model, load_splits, open_epoch, training_processor
from hf_maskformer.training.shards import is_sharded, shard_model, shards_wanted
from hf_maskformer.training.step import training_step
from hf_maskformer.training.trackers import ProgressBar, RunningMean


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, evaluate and save under `config.output_dir`; returns what RUN/metrics.json holds.

    Raises:
        ValueError: bad options or data (naming the file), a run that is already there without `resume`, or a
            repository of `push_to_hub` that cannot be written.
        NotPublished: the run is finished, but the Hub did not take it.
        FloatingPointError: a loss or gradient that is not finite, naming the images of the step, which is written to
            RUN/failures; checkpoints stay. With `on_nonfinite="skip"` only after 10 such steps in a row.
    """
    run = Path(config.output_dir)
    sharded = shards_wanted(config.fsdp)
    accelerator = open_accelerator(config)
    check_machine(config, accelerator, sharded=sharded)
    config = known_batch_size(config, accelerator)
    checkpoint = open_run(run, config, accelerator)
    train_data, val_data = load_splits(config)
    set_seed(config.seed)
    model, processor = open_model(config, train_data, checkpoint)
    check_publishing(config, accelerator)
    config = found_batch_size(config, model, processor, train_data, accelerator)
    whole = shard_model(model, accelerator) if sharded else None
    if config.compile:
        compile_parts(model, accelerator.device)
    optimizer, state = open_optimizer(config, model, accelerator, checkpoint)
    batches = open_batches(config, train_data, processor, accelerator, first_step=state.step)
    images_per_step = config.images_per_pass * config.gradient_accumulation_steps * accelerator.num_processes
    budget = Budget(config, num_images=dataset_length(train_data), images_per_step=images_per_step)
    budget.resume(state)
    model, optimizer = prepare(accelerator, model, optimizer)
    model.train()
    average = open_average(config, accelerator.unwrap_model(model), checkpoint)
    keeper = Keeper(run, config, accelerator, model, processor, optimizer, val_data, average, whole, resumed=state)

    diary, means = FailureDiary(keeper), RunningMean()
    with ProgressBar(enabled=accelerator.is_main_process) as bar:
        while not budget.spent(state):
            if budget.evaluation_due(state):
                keeper.evaluate(state, passed=budget.passed(state))
                if budget.stopped_early(state):
                    break
            started = time.perf_counter()
            seed_step(config.seed, state.step, accelerator.process_index)
            window = [move(next(batches), accelerator.device) for _ in range(config.gradient_accumulation_steps)]
            data_seconds = time.perf_counter() - started
            factor = schedule_factor(config, step=state.step, progress=budget.progress(state))
            set_learning_rate(optimizer.param_groups, factor)
            phase_matching(config, accelerator.unwrap_model(model), budget.progress(state))
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
    summary = keeper.finish(state)
    publish_finished(config, accelerator, summary)
    return summary


def open_model(config: TrainConfig, data: SegmentationData, checkpoint: Path | None) -> tuple[Any, Any]:
    """`build_model`, with activation checkpointing where it is asked for.

    Raises:
        ValueError: `bipartite_after` for a model whose matching it does not change.
    """
    model, processor = build_model(config, data, checkpoint)
    if config.bipartite_after is not None and model.config.matcher != "fixed":
        raise ValueError(
            f"bipartite_after is {config.bipartite_after}, but the model's matcher is {model.config.matcher!r}; it "
            "changes 'fixed' to 'hungarian': set config_overrides matcher=fixed (semantic only) or leave it out"
        )
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model, processor


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Accelerate's wrapped model and optimizer; a sharded model stays as it is."""
    if is_sharded(model):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


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


def phase_matching(config: TrainConfig, model: Any, progress: float) -> None:
    """Class-fixed matching in the first part of the budget, bipartite in the rest, where that is asked for."""
    if config.bipartite_after is not None:
        model.criterion.matcher = "fixed" if progress < config.bipartite_after else "hungarian"


def checkpoint_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """Switch on the model's own gradient checkpointing, in the older or the newer of torch's two forms."""
    # The name before transformers 5.23, deprecated since.
    old_name = not hasattr(model, "activation_checkpointing_enable")
    enable = model.gradient_checkpointing_enable if old_name else model.activation_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def open_average(config: TrainConfig, model: torch.nn.Module, checkpoint: Path | None) -> WeightAverage | None:
    """The averaged weights as in the checkpoint, else as the model's; None without `ema_decay`."""
    if config.ema_decay is None:
        return None
    average = WeightAverage(model, config.ema_decay)
    if checkpoint is not None:
        average.load_state_dict(load_average(checkpoint))
    return average


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
            batch_size=config.images_per_pass,
            first_batch=first_step * config.gradient_accumulation_steps,
            num_workers=config.num_workers,
        )
    stream = StreamDataset(
        partial(open_epoch, data, augmentation, config.seed, config.on_bad_sample), length=len(data), seed=config.seed
    )
    sampler = MicroBatches(
        batch_size=config.images_per_pass,
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
