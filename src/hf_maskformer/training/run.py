"""A run's folder: what is written beside the training steps, and when a run may be opened."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

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
from hf_maskformer.training.samples import sample_sheet, spread_indices
from hf_maskformer.training.trackers import JsonlLog, scalars

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
    ) -> None:
        self.run, self.config, self.accelerator = run, config, accelerator
        self.model = accelerator.unwrap_model(model)
        self.processor, self.optimizer, self.val_data = processor, optimizer, val_data
        self.file = JsonlLog(run / "log.jsonl", resume_step=resume_step) if accelerator.is_main_process else None
        self.saved_step = resume_step  # of the newest checkpoint; 0: there is none

    def log(self, state: TrainState, **values: Any) -> None:
        if self.file is not None:
            self.file.write(step=state.step, minutes=round(state.seconds / 60.0, 4), **values)

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
            )
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()

    def evaluate(self, state: TrainState) -> None:
        """One of the evaluations before the last. `state` has a checkpoint before it, and its result after it."""
        self.save_checkpoint(state)
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
                state.best_value, state.best_step = value, state.step
                save_model(self.run / "best", self.model, self.processor)
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
            save_model(self.run / "final", self.model, self.processor)
            if self.val_data is None:
                save_model(self.run / "best", self.model, self.processor)
        metrics = self.choose_best(state)
        if metrics and self.config.eval_limit is not None and self.config.eval_limit < len(self.val_data):
            metrics = self.measure(state, limit=None)
        state.evaluations += 1
        summary = {
            **metrics,
            "steps": state.step,
            "training_minutes": state.seconds / 60.0,
            "best_step": state.best_step,
            "best_value": state.best_value,
            "seed": self.config.seed,
        }
        if self.accelerator.is_main_process:
            write_text(self.run / "metrics.json", json.dumps(json_ready(summary), indent=2))
        self.save_checkpoint(state)
        return summary


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
