"""A run's folder: what is written beside the training steps, and when a run may be opened."""

import json
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.evaluation.json_format import json_ready
from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.checkpoint import (
    newest_checkpoint,
    restore_replaced,
    save_checkpoint,
    save_model,
    store_progress,
    write_text,
)
from hf_maskformer.training.config import CONFIG_FILE, TrainConfig, check_same_run
from hf_maskformer.training.curves import draw_curves
from hf_maskformer.training.ema import WeightAverage
from hf_maskformer.training.hardware import hardware
from hf_maskformer.training.samples import sample_sheet, spread_indices
from hf_maskformer.training.summary import run_facts
from hf_maskformer.training.trackers import JsonlLog, finish_tracker, log_to_tracker, scalars, start_tracker

logger = logging.getLogger(__name__)

MAIN_METRIC = {"semantic": "mean_iou", "panoptic": "pq", "instance": "map"}


class Keeper:
    """Log, checkpoints, evaluation, best and final model; only the main process writes."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        processor: Any,
        optimizer: Any,
        val_data: Any,
        *,
        resume_step: int,
        average: WeightAverage | None = None,
    ) -> None:
        self.run, self.config, self.accelerator = run, config, accelerator
        self.model = accelerator.unwrap_model(model)
        self.processor, self.optimizer, self.val_data = processor, optimizer, val_data
        self.average = average  # evaluated and published instead of the model's own weights
        self.file = JsonlLog(run / "log.jsonl", resume_step=resume_step) if accelerator.is_main_process else None
        start_tracker(accelerator, config.to_dict(), run, resume_step=resume_step)
        self.saved_step = resume_step  # of the newest checkpoint; 0: there is none

    def log(self, state: TrainState, **values: Any) -> None:
        if self.file is not None:
            self.file.write(step=state.step, minutes=round(state.seconds / 60.0, 4), **values)
            log_to_tracker(self.accelerator, values, step=state.step)

    def images_per_step(self) -> int:
        """Over all processes."""
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def save_checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint; where this step has one, only `state` can have changed and is stored in it."""
        folder = self.run / "checkpoints"
        if self.accelerator.is_main_process and self.saved_step == state.step:
            store_progress(folder, state.step, state.to_dict())
        elif self.accelerator.is_main_process:
            save_checkpoint(
                folder,
                model=self.model,
                processor=self.processor,
                optimizer=self.optimizer,
                state={
                    "step": state.step,
                    "progress": state.to_dict(),
                    "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                },
                keep=self.config.keep_checkpoints,
                average=None if self.average is None else self.average.state_dict(),
            )
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()

    def published_weights(self) -> AbstractContextManager[None]:
        """In this block the model holds the weights that are evaluated and saved as best and final."""
        return nullcontext() if self.average is None else self.average.applied(self.model)

    def evaluate(self, state: TrainState) -> None:
        """One of the evaluations before the last. `state` has a checkpoint before it, and its result after it."""
        self.save_checkpoint(state)
        with self.published_weights():
            self.choose_best(state)
        state.evaluations += 1
        self.save_checkpoint(state)

    def choose_best(self, state: TrainState) -> dict[str, Any]:
        """Metrics on the images of every evaluation; the weights that are best on them are saved as RUN/best."""
        metrics = self.measure(state, limit=self.config.eval_limit)
        if metrics:
            self.draw_samples(state)
            value = metrics[MAIN_METRIC[self.val_data.task]]
            # A metric without any class to average over is nan; such a model is never better than another.
            value = value if math.isfinite(value) else -1.0
            if state.best_value is None or value > state.best_value:
                state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
                save_model(self.run / "best", self.model, self.processor)
            else:
                state.evaluations_since_best += 1
                number = state.evaluations_since_best
                if self.config.early_stopping_patience is not None and number >= self.config.early_stopping_patience:
                    logger.info("step %d: the last %d evaluations were not better than the best", state.step, number)
        # Every process must know it, because all of them must end the run at the same step.
        state.evaluations_since_best = int(shared_float(state.evaluations_since_best, self.accelerator))
        self.accelerator.wait_for_everyone()
        return metrics

    def measure(self, state: TrainState, *, limit: int | None) -> dict[str, Any]:
        """Metrics of the current weights on the first `limit` images; empty off the main process or without data."""
        if not self.accelerator.is_main_process or self.val_data is None:
            return {}
        metrics = evaluate(
            self.model,
            self.processor,
            self.val_data,
            batch_size=self.config.eval_batch_size,
            device=self.accelerator.device,
            progress=False,
            limit=limit,
            on_bad_sample=self.config.on_bad_sample,
        )
        images = len(self.val_data) if limit is None else min(limit, len(self.val_data))
        self.log(state, event="evaluation", images=images, **scalars(metrics))
        name = MAIN_METRIC[self.val_data.task]
        logger.info("step %d: %s %.4f on %d images", state.step, name, metrics[name], images)
        return metrics

    def draw_samples(self, state: TrainState) -> None:
        if self.config.num_samples == 0:
            return
        indices = spread_indices(len(self.val_data), self.config.num_samples)
        sheet = sample_sheet(
            self.model, self.processor, self.val_data, indices, self.accelerator.device, self.config.on_bad_sample
        )
        if sheet is not None:
            folder = self.run / "samples"
            folder.mkdir(exist_ok=True)
            sheet.save(folder / f"step-{state.step:08d}.png")

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Last checkpoint and RUN/final, so that nothing after them can lose the weights; then the last evaluation.

        The last evaluation is on all images. Where `eval_limit` left some out before, the weights are first measured
        on the same images as the earlier ones, because RUN/best is chosen among equals.
        """
        self.save_checkpoint(state)
        if self.accelerator.is_main_process:
            with self.published_weights():
                save_model(self.run / "final", self.model, self.processor)
                if self.val_data is None:
                    save_model(self.run / "best", self.model, self.processor)
        with self.published_weights():
            metrics = self.choose_best(state)
            if metrics and self.config.eval_limit is not None and self.config.eval_limit < len(self.val_data):
                metrics = self.measure(state, limit=None)
        state.evaluations += 1
        summary = {
            **metrics,
            "main_metric": MAIN_METRIC[self.val_data.task] if self.val_data is not None else None,
            **run_facts(state, images_per_step=self.images_per_step(), device=self.accelerator.device),
            "best_step": state.best_step,
            "best_value": state.best_value,
            "seed": self.config.seed,
            "hardware": hardware(self.accelerator),
        }
        if self.accelerator.is_main_process:
            write_text(self.run / "metrics.json", json.dumps(json_ready(summary), indent=2))
            draw_curves(self.run)
            finish_tracker(self.accelerator)
        self.save_checkpoint(state)
        return summary


def shared_float(value: float, accelerator: Accelerator) -> float:
    """The main process's value on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def open_run(run: Path, config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """Create the run's folder and store its configuration; the checkpoint to resume from, or None.

    Raises:
        ValueError: the folder already holds a run or its models and `resume` is not set, or it is resumed with other
            options.
    """
    for name in ("best", "final"):
        restore_replaced(run / name)
    checkpoint = newest_checkpoint(run / "checkpoints")
    if checkpoint is not None and not config.resume:
        raise ValueError(
            f"output_dir {run} already holds a run ({checkpoint.name}); add --resume or choose another one"
        )
    models = [name for name in ("best", "final") if (run / name).exists()]
    if models and not config.resume:
        raise ValueError(f"output_dir {run} already holds a model ({', '.join(models)}); choose another one")
    stored = run / CONFIG_FILE
    if checkpoint is not None and stored.is_file():
        check_same_run(json.loads(stored.read_text()), config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write_text(stored, json.dumps(config.to_dict(), indent=2))
    if config.resume:
        logger.info("resuming from %s", checkpoint or "the beginning: no checkpoint yet")
    return checkpoint
