"""The failure diary: a step whose loss or gradient is not finite, written down so that it can be run again.

`RUN/failures/step-00000012/` holds `model/` (the weights before the step, with the processor), `adapters.safetensors`
(those of LoRA, which `model/` is without) and, for each process, a directory `process-N/` with `batches.safetensors`
(images and masks of its forward passes) and `failure.json` (class labels, image ids, what the step's random numbers
come from, how the model was trained, the loss terms and the error). Nothing is pickled.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.checkpoint import MODEL_FOLDER, write_directory
from hf_maskformer.training.fine_tuning import held_batch_norms
from hf_maskformer.training.lora import has_adapters, save_apart
from hf_maskformer.training.run import Keeper

FAILURES_FOLDER = "failures"
BATCHES_FILE = "batches.safetensors"
FAILURE_FILE = "failure.json"
MAX_SKIPS = 10  # steps left out one after the other before a run gives up
OTHER_PROCESS = "the forward pass of another process failed"  # the reason on those without a failure of their own
MAX_FOLDERS = 10  # newest kept: each holds a whole model

logger = logging.getLogger(__name__)


class NonFiniteStep(FloatingPointError):
    """A step that was not taken: the model is as it was before it, and the gradients are cleared.

    Attributes:
        step: number of the step, from 0.
        reason: what is not finite.
        normalizer: (3,) counts that the step's losses were divided by, see `loss_normalizer`.
        terms: the loss and its terms of this process's finished forward passes, in the window's order.
    """

    def __init__(self, step: int, reason: str, *, normalizer: torch.Tensor, terms: list[dict[str, float]]) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.normalizer, self.terms = step, reason, normalizer, terms

    @property
    def guilty(self) -> bool:
        """Whether a loss of this process's own finished forward passes is not finite."""
        return any(not math.isfinite(value) for terms in self.terms for value in terms.values())


class FailureDiary:
    """Writes failed steps under `RUN/failures` and says whether the run goes on.

    Every process must have one and come to the same steps: naming the images is a collective call.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.config, self.accelerator = keeper, keeper.config, keeper.accelerator
        self.skipped = 0  # steps left out since the last one that was taken

    def watch(
        self, state: TrainState, window: list[dict[str, Any]], take_step: Callable[[], dict[str, float]]
    ) -> dict[str, float] | None:
        """What `take_step()` returns; None for a step that was left out.

        Raises:
            FloatingPointError: the step's loss or gradient is not finite, and `on_nonfinite` is "raise" or it was the
                tenth such step in a row; names the images and where the step is written.
        """
        try:
            values = take_step()
        except NonFiniteStep as failure:
            message = f"step {failure.step}: {self.describe(failure, window)}; {self.write(failure, window)}"
            if self.config.on_nonfinite == "raise":
                raise FloatingPointError(message) from failure
            self.skipped += 1
            after = replace(state, step=state.step + 1)  # as the lines of steps that are taken
            self.keeper.log(after, event="skipped", error=message)
            if self.skipped == MAX_SKIPS:
                raise FloatingPointError(f"{message}; {MAX_SKIPS} steps in a row were left out") from failure
            logger.warning("left out %s", message)
            return None
        self.skipped = 0
        return values

    def describe(self, failure: NonFiniteStep, window: list[dict[str, Any]]) -> str:
        """Reason and images of the step over all processes."""
        own = {
            "process": self.accelerator.process_index,
            "guilty": failure.guilty,
            "reason": failure.reason,
            "images": [image_id for batch in window for image_id in batch["image_ids"]],
        }
        if self.accelerator.num_processes == 1:
            return f"{own['reason']}; the images of this step are {own['images']}"
        parts = gather_object([own])
        images = "; ".join(f"process {part['process']}: {part['images']}" for part in parts)
        named = [part for part in parts if part["guilty"]]
        named = named or [part for part in parts if part["reason"] != OTHER_PROCESS]
        reasons = {part["reason"]: part["process"] for part in reversed(named)}
        reason = ", ".join(f"{reason} (process {process})" for reason, process in reversed(reasons.items()))
        return f"{reason}; the images of this step are {images}"

    def write(self, failure: NonFiniteStep, window: list[dict[str, Any]]) -> str:
        """Write this process's part, and the main process the model; says where, or why not (a full disk)."""
        accelerator = self.accelerator
        folder = self.keeper.run / FAILURES_FOLDER / f"step-{failure.step:08d}"
        record = {
            "step": failure.step,
            "seed": self.config.seed,
            "process": accelerator.process_index,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "loss_scale": float(accelerator.scaler.get_scale()) if accelerator.scaler is not None else 1.0,
            "normalizer": failure.normalizer.tolist(),
            **self.training_setup(),
            "error": failure.reason,
            "terms": [{name: number_text(value) for name, value in terms.items()} for terms in failure.terms],
        }
        model = self.keeper.whole_model()
        try:
            write_part(folder / f"process-{accelerator.process_index}", window, record)
            if accelerator.is_main_process:
                write_model(folder, model, self.keeper.processor)
                for old in sorted(folder.parent.glob("step-*"))[:-MAX_FOLDERS]:
                    shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            return f"the step could not be written to {folder}: {error}"
        finally:
            accelerator.wait_for_everyone()  # no process may end the others before all parts are there
        return f"the step is in {folder}, `hf-maskformer replay` runs it again"

    def training_setup(self) -> dict[str, Any]:
        """What the run has changed in the model that its configuration and weights do not tell."""
        model, config = self.keeper.model, self.config
        adapters = {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": list(config.lora_targets)}
        return {
            "matcher": model.criterion.matcher,
            "adapters": adapters if has_adapters(model) else None,
            "untrained": [name for name, value in model.named_parameters() if not value.requires_grad],
            "held_batch_norms": held_batch_norms(model),
        }


def write_model(folder: Path, model: Any, processor: Any) -> None:
    """The model in `folder/model`, and before it its adapters, if it has some, in a file of `folder`, which exists."""

    def write(directory: Path) -> None:
        save_apart(model, directory, folder)
        processor.save_pretrained(directory)

    write_directory(folder / MODEL_FOLDER, write)


def write_part(path: Path, window: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """One process's batches and record, whole or not at all.

    A tensor is stored as "batch.name", the tensors of a list as "batch.name.number"; class labels and whatever is no
    tensor stand in the record.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] = []
    for number, batch in enumerate(window):
        plain.append({"image_ids": list(batch["image_ids"])})
        plain[-1]["class_labels"] = [labels.tolist() for labels in batch["class_labels"]]
        for name in ("pixel_values", "pixel_mask"):
            tensors[f"{number}.{name}"] = batch[name]
        for image, masks in enumerate(batch["mask_labels"]):
            tensors[f"{number}.mask_labels.{image}"] = masks

    def write(directory: Path) -> None:
        # Copies: images of one batch may be views of one storage, which safetensors refuses.
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(copies, directory / BATCHES_FILE)
        (directory / FAILURE_FILE).write_text(json.dumps({**record, "batches": plain}, indent=2))

    write_directory(path, write)


def read_part(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The batches and the record of one process, as `write_part` was given them.

    Raises:
        ValueError: a file is missing or damaged; names it.
    """
    try:
        record = json.loads((path / FAILURE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / FAILURE_FILE} cannot be read: {error}") from error
    try:
        tensors = load_file(path / BATCHES_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path / BATCHES_FILE} cannot be read: {error}") from error
    window = []
    for number, plain in enumerate(record.pop("batches")):
        batch: dict[str, Any] = {name: tensors[f"{number}.{name}"] for name in ("pixel_values", "pixel_mask")}
        batch["mask_labels"] = [tensors[f"{number}.mask_labels.{image}"] for image in range(len(plain["image_ids"]))]
        batch["class_labels"] = [torch.tensor(labels, dtype=torch.int64) for labels in plain["class_labels"]]
        window.append({**batch, "image_ids": plain["image_ids"]})
    record["terms"] = [{name: float(value) for name, value in terms.items()} for terms in record["terms"]]
    return window, record


def number_text(value: float) -> float | str:
    """A number for JSON, which has no nan and no infinity: those as "nan", "inf", "-inf", which `float` reads."""
    return value if math.isfinite(value) else str(value)
