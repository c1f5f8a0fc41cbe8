"""Runs a step of the failure diary again: forward and backward passes of all its processes, one after the other."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training.checkpoint import MODEL_FOLDER
from hf_maskformer.training.failure import read_part
from hf_maskformer.training.fine_tuning import hold_batch_norms
from hf_maskformer.training.lora import add_adapters, load_adapters
from hf_maskformer.training.step import loss_terms, model_inputs
from hf_maskformer.training.train import move, seed_step

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ForwardPass:
    """One forward pass of the step.

    Attributes:
        process, number: whose it is, and its place in that process's accumulation window.
        image_ids: of its batch.
        terms: the loss and its terms; empty where the forward pass itself ended with `error`.
        recorded: the terms that the run wrote down; empty where it did not come that far.
        findings: image id -> what is not finite for it: its own pixels, or what the model in evaluation mode gives
            for this image alone. Only looked for where the pass is not finite.
    """

    process: int
    number: int
    image_ids: list[str]
    terms: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    findings: dict[str, list[str]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return self.error is None and all(math.isfinite(value) for value in self.terms.values())


@dataclass
class Replay:
    """What running the step again gave.

    Attributes:
        record: of the first process, see `failure.json`.
        weights: names of parameters and buffers that were not finite before the step.
        passes: all forward passes, process after process.
        gradients: parameter -> norm of its gradient; empty where a forward pass ended with an error.
    """

    record: dict[str, Any]
    weights: list[str]
    passes: list[ForwardPass]
    gradients: dict[str, float]

    @property
    def grad_norm(self) -> float:
        return math.hypot(*self.gradients.values())

    @property
    def fails(self) -> bool:
        """Not with fp16 for the gradient alone, as long as its scaler can pass over the step with a smaller scale."""
        scaled = self.record["mixed_precision"] == "fp16" and (self.record.get("loss_scale") or 1.0) >= 1.0
        return not all(one.finite for one in self.passes) or not (scaled or math.isfinite(self.grad_norm))


def replay(folder: Path, device: torch.device) -> Replay:
    """Run the step that is written in `folder` (RUN/failures/step-N) again, without an update.

    The gradient is the mean over the step's processes, as it was then. Random numbers of another kind of device
    (dropout) are other numbers.

    Raises:
        ValueError: the folder is none of the diary's, or is not whole.
    """
    parts = [read_part(folder / "process-0")]
    parts += [read_part(folder / f"process-{number}") for number in range(1, parts[0][1]["num_processes"])]
    model = model_of_step(folder, parts[0][1]).to(device).train()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    passes = [one for window, record in parts for one in run_process(model, window, record, device)]
    gradients = {}
    if all(one.error is None for one in passes):
        divisor = parts[0][1]["loss_scale"] * len(parts)
        gradients = {
            name: float(parameter.grad.norm()) / divisor
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return Replay(parts[0][1], weights, passes, gradients)


def model_of_step(folder: Path, record: dict[str, Any]) -> Any:
    """The model before the step, with the adapters, frozen parts, batch norms and matching that it was trained with.

    A record without them is of a version that did not write them down: the model is as its configuration says.
    """
    try:
        model = HfMaskFormerForUniversalSegmentation.from_pretrained(folder / MODEL_FOLDER)
    except OSError as error:
        raise ValueError(f"{folder / MODEL_FOLDER} cannot be loaded: {error}") from error
    if "matcher" not in record:
        return model
    if record["adapters"] is not None:
        add_adapters(model, **record["adapters"])
        load_adapters(model, folder)
    model.criterion.matcher = record["matcher"]
    for name in record["held_batch_norms"]:
        hold_batch_norms(model.get_submodule(name))
    untrained = set(record["untrained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in untrained)
    return model


def run_process(model: Any, window: list[dict[str, Any]], record: dict[str, Any], device: torch.device) -> Any:
    """One process's part of the step; adds its gradients (times the fp16 loss scale) and yields its `ForwardPass`es.

    As in the run, nothing follows a forward pass that ends with an error.
    """
    normalizer = torch.tensor(record["normalizer"], dtype=torch.float64)
    dtype = AUTOCAST_DTYPES.get(record["mixed_precision"])
    buffers = [buffer.clone() for buffer in model.buffers()]
    seed_step(record["seed"], record["step"], record["process"])
    for number, stored in enumerate(window):
        batch = move(stored, device)
        one = ForwardPass(record["process"], number, stored["image_ids"])
        one.recorded = record["terms"][number] if number < len(record["terms"]) else {}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            try:
                outputs = model(**model_inputs(batch, record["step"]), loss_normalizer=normalizer)
            except FloatingPointError as error:
                one.error = str(error)
            else:
                one.terms = {name: float(term) for name, term in loss_terms(outputs).items()}
        if one.error is None:
            (outputs.loss * record["loss_scale"] / len(window)).backward()
        if not one.finite:
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # the pass may have spoilt the batch norms' statistics
            one.findings = {
                image_id: look_at_image(model, model_inputs(batch, record["step"]), index, normalizer, dtype)
                for index, image_id in enumerate(stored["image_ids"])
            }
        yield one
        if one.error is not None:
            return


@torch.no_grad()
def look_at_image(
    model: Any, inputs: dict[str, Any], index: int, normalizer: torch.Tensor, dtype: torch.dtype | None
) -> list[str]:
    """What is not finite for one image alone, so that the others of its batch cannot be the cause.

    In evaluation mode, because batch norms in training spread a value that is not finite over the whole batch.
    """
    alone = {name: value[index : index + 1] for name, value in inputs.items()}
    found = [] if alone["pixel_values"].isfinite().all() else ["pixel_values"]
    found += [] if alone["mask_labels"][0].isfinite().all() else ["mask_labels"]
    model.eval()
    with torch.autocast(alone["pixel_values"].device.type, dtype=dtype, enabled=dtype is not None):
        outputs = model(pixel_values=alone["pixel_values"], pixel_mask=alone["pixel_mask"])
        for name in ("class_queries_logits", "masks_queries_logits"):
            found += [] if outputs[name].isfinite().all() else [name]
        if not found:
            outputs = model(**alone, loss_normalizer=normalizer)
            found = [name for name, term in outputs.loss_dict.items() if not term.isfinite()]
    model.train()
    return found
