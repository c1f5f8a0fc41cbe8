"""A run's folder: what is written beside the training steps, and when a run may be opened."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.evaluation.json_format import json_ready
from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.checkpoint import (
    checkpoint_folders,
    damage,
    load_state,
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
from hf_maskformer.training.shards import WholeCopy, whole_optimizer_state, whole_tensors
from hf_maskformer.training.summary import NO_SCORE, run_facts
from hf_maskformer.training.trackers import (
    JsonlLog,
    finish_tracker,
    log_sheet_to_tracker,
    log_to_tracker,
    scalars,
    start_tracker,
)

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
        average: WeightAverage | None = None,
        whole: WholeCopy | None = None,
        *,
        resumed: TrainState,
    ) -> None:
        self.run, self.config, self.accelerator = run, config, accelerator
        self.model = accelerator.unwrap_model(model)
        self.processor, self.optimizer, self.val_data = processor, optimizer, val_data
        self.average = average  # evaluated and published instead of the model's own weights
        self.whole = whole  # stands for a sharded model
        main = accelerator.is_main_process
        self.file = (
            JsonlLog(run / "log.jsonl", resume_step=resumed.step, evaluated_step=resumed.evaluated_step)
            if main
            else None
        )
        start_tracker(accelerator, config.to_dict(), run, resume_step=resumed.step)
        self.metrics: dict[str, Any] | None = None  # of the newest evaluation; empty off the main process
        self.saved_step = resumed.step  # of the newest checkpoint; 0: there is none

    def log(self, state: TrainState, **values: Any) -> None:
        if self.file is not None:
            self.file.write(step=state.step, minutes=round(state.seconds / 60.0, 4), **values)
            log_to_tracker(self.accelerator, values, step=state.step)

    def images_per_step(self) -> int:
        """Over all processes."""
        config = self.config
        return config.images_per_pass * config.gradient_accumulation_steps * self.accelerator.num_processes

    def whole_model(self) -> Any:
        """The model with all of its weights; of a sharded one a copy on the main process, None on the others."""
        return self.model if self.whole is None else self.whole.filled(self.model)

    @contextmanager
    def published_model(self) -> Iterator[Any]:
        """In this block, `whole_model` with the weights that are evaluated and saved as best and final."""
        if self.whole is not None:
            yield self.whole.filled(self.model, None if self.average is None else self.average.state_dict())
            return
        with nullcontext() if self.average is None else self.average.applied(self.model), full_precision(self.model):
            yield self.model

    def save_checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint; where this step has one, only `state` can have changed and is stored in it."""
        if self.saved_step == state.step:
            if self.accelerator.is_main_process:
                store_progress(self.run / "checkpoints", state.step, state.to_dict())
        else:
            self.write_checkpoint(state)
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()

    def write_checkpoint(self, state: TrainState) -> None:
        """All processes gather what is divided among them, the main one writes."""
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        model, optimizer_state = self.whole_model(), whole_optimizer_state(self.optimizer, keep=main)
        average = None if self.average is None else whole_tensors(self.average.state_dict().items(), keep=main)
        if main:
            save_checkpoint(
                self.run / "checkpoints",
                model=model,
                processor=self.processor,
                optimizer_state=optimizer_state,
                state={
                    "step": state.step,
                    "progress": state.to_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "num_processes": self.accelerator.num_processes,
                    "images_per_step": self.images_per_step(),
                },
                keep=self.config.keep_checkpoints,
                average=average,
            )

    def evaluate(self, state: TrainState, *, passed: int) -> None:
        """One of the evaluations before the last, which makes `passed` of them, see `Budget.passed`.

        `state` has a checkpoint before it, and its result after it.
        """
        self.save_checkpoint(state)
        with self.published_model() as model:
            self.metrics = self.choose_best(state, model)
        state.evaluations = passed
        state.evaluated_step = state.step
        self.save_checkpoint(state)

    def choose_best(self, state: TrainState, model: Any) -> dict[str, Any]:
        """Metrics on the images of every evaluation; the weights that are best on them are saved as RUN/best."""
        metrics = self.measure(state, model, limit=self.config.eval_limit)
        if metrics:
            self.draw_samples(state, model)
            value = metrics[MAIN_METRIC[self.val_data.task]]
            # A metric without any class to average over is nan; such a model is never better than another.
            value = value if math.isfinite(value) else NO_SCORE
            if value == NO_SCORE:
                logger.warning("step %d: the val split has no truth to measure the main metric on", state.step)
            if state.best_value is None or value > state.best_value:
                state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
                save_model(self.run / "best", model, self.processor)
            else:
                state.evaluations_since_best += 1
                number = state.evaluations_since_best
                if self.config.early_stopping_patience is not None and number >= self.config.early_stopping_patience:
                    logger.info("step %d: the last %d evaluations were not better than the best", state.step, number)
        # Every process must know it, because all of them must end the run at the same step.
        state.evaluations_since_best = int(shared_float(state.evaluations_since_best, self.accelerator))
        self.accelerator.wait_for_everyone()
        return metrics

    def measure(self, state: TrainState, model: Any, *, limit: int | None) -> dict[str, Any]:
        """Metrics of `model` on the first `limit` images; empty off the main process or without data."""
        if not self.accelerator.is_main_process or self.val_data is None:
            return {}
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for the sizes of evaluation
            metrics = evaluate(
                model,
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

    def draw_samples(self, state: TrainState, model: Any) -> None:
        if self.config.num_samples == 0:
            return
        indices = spread_indices(len(self.val_data), self.config.num_samples)
        with torch.compiler.set_stance("force_eager"):
            sheet = sample_sheet(
                model, self.processor, self.val_data, indices, self.accelerator.device, self.config.on_bad_sample
            )
        if sheet is not None:
            folder = self.run / "samples"
            folder.mkdir(exist_ok=True)
            sheet.save(folder / f"step-{state.step:08d}.png")
            log_sheet_to_tracker(self.accelerator, sheet, step=state.step)

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Last checkpoint and RUN/final, so that nothing after them can lose the weights; then the last evaluation.

        The last evaluation is on all images. Where `eval_limit` left some out before, the weights are first measured
        on the same images as the earlier ones, because RUN/best is chosen among equals. After an early stop they have
        been already.
        """
        path = self.run / "metrics.json"
        finished = state.finished_step == state.step  # resumed after its end
        if finished and shared_float(path.is_file(), self.accelerator):
            finish_tracker(self.accelerator)
            return json.loads(path.read_text())
        self.save_checkpoint(state)
        with self.published_model() as model:
            if self.accelerator.is_main_process:
                save_model(self.run / "final", model, self.processor)
                if self.val_data is None:
                    save_model(self.run / "best", model, self.processor)
            chosen = state.evaluated_step == state.step
            metrics = self.metrics if chosen else self.choose_best(state, model)
            limit = self.config.eval_limit
            limited = limit is not None and self.val_data is not None and limit < len(self.val_data)
            if metrics is None or limited:
                metrics = self.measure(state, model, limit=None)
        state.evaluated_step = state.finished_step = state.step
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
            write_text(path, json.dumps(json_ready(summary), indent=2))
            draw_curves(self.run)
            finish_tracker(self.accelerator)
        self.save_checkpoint(state)
        return summary


@contextmanager
def full_precision(model: torch.nn.Module) -> Iterator[None]:
    """In this block `model` runs without the autocast that Accelerate wraps it in, as everyone will who loads it."""
    wrapped = model.__dict__.pop("forward", None)  # that of the class is seen again
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def shared_float(value: float, accelerator: Accelerator) -> float:
    """The main process's value on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def open_run(run: Path, config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """Create the run's folder and store its configuration; the checkpoint to resume from, or None.

    Raises:
        ValueError: the folder already holds a run or its models and `resume` is not set, none of its checkpoints is
            whole, or it is resumed with other options.
    """
    if accelerator.is_main_process:
        for name in ("best", "final"):
            restore_replaced(run / name)
    accelerator.wait_for_everyone()
    folders = checkpoint_folders(run / "checkpoints")
    if folders and not config.resume:
        raise ValueError(
            f"output_dir {run} already holds a run ({folders[-1].name}); add --resume or choose another one"
        )
    checkpoint = newest_checkpoint(run / "checkpoints")
    models = [name for name in ("best", "final") if (run / name).exists()]
    if models and not config.resume:
        raise ValueError(f"output_dir {run} already holds a model ({', '.join(models)}); choose another one")
    if checkpoint is None and (folders or models):
        problems = [f"{path.name}: {damage(path)}" for path in folders] or [f"only {', '.join(models)} are left"]
        raise ValueError(
            f"none of the checkpoints in {run / 'checkpoints'} is whole ({'; '.join(problems)}); move the folder away "
            "to start anew"
        )
    stored = run / CONFIG_FILE
    if checkpoint is not None and stored.is_file():
        check_same_run(json.loads(stored.read_text()), config)
    if checkpoint is not None:
        check_same_processes(checkpoint, config, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write_text(stored, json.dumps(config.to_dict(), indent=2))
    if config.resume:
        logger.info("resuming from %s", checkpoint or "the beginning: no checkpoint yet")
    return checkpoint


def check_same_processes(checkpoint: Path, config: TrainConfig, now: int) -> None:
    """A warning if other processes give a resumed run's steps other images; ValueError if they cut up its stream anew.

    With `images_per_step` and another number of processes the steps go on with the same images.
    """
    stored = load_state(checkpoint)
    then = stored.get("num_processes", now)
    if then == now:
        return
    if config.dataset_options.get("streaming"):
        raise ValueError(
            f"cannot resume {config.output_dir} with {now} processes: {checkpoint.name} was written by {then}, which "
            f"divide streamed data in another way; start {then} of them"
        )
    if config.batch_size != "auto":
        images = config.images_per_pass * config.gradient_accumulation_steps * now
        if stored.get("images_per_step") == images:
            return
    logger.warning("%s was written by %d processes, there are %d now: steps have other images", checkpoint, then, now)
