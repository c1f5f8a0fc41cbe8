"""One optimizer step: the forward and backward passes of an accumulation window, clipping, the update."""

import math
import zlib
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from hf_maskformer.training.failure import OTHER_PROCESS, NonFiniteStep
from hf_maskformer.training.shards import is_sharded, reshard, whole


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    window: list[dict[str, Any]],
    *,
    step: int,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Forward and backward over one accumulation window, clip, update; `loss_terms` over all processes.

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
                outputs = forward_together(accelerator, model, model_inputs(batch, step), normalizer)
                accelerator.backward(outputs.loss)
            named = loss_terms(outputs)
            names, terms = list(named), torch.stack(list(named.values()))
            passes.append(terms)
            total = total + terms / len(window)
        values = dict(zip(names, accelerator.reduce(total, reduction="mean").tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']}")
        # Clipping to infinity changes nothing and still gives the norm.
        limit = math.inf if max_grad_norm is None else max_grad_norm
        norm = float(whole(accelerator.clip_grad_norm_(model.parameters(), limit)))
        if not math.isfinite(norm) and not scaler_will_help(accelerator):
            if accelerator.scaler is not None:
                accelerator.scaler.update(accelerator.scaler.get_scale())  # it has unscaled a gradient of no step
            raise FloatingPointError(f"the gradient's norm is {norm}")
        values["grad_norm"] = norm
    except FloatingPointError as error:
        leave_step(model, optimizer, buffers)
        finished = [dict(zip(names, terms.tolist(), strict=True)) for terms in passes]
        raise NonFiniteStep(step, str(error), normalizer=normalizer, terms=finished) from error
    optimizer.step()
    optimizer.zero_grad()
    return values


def scaler_will_help(accelerator: Accelerator) -> bool:
    """Whether the fp16 scaler passes over a step whose gradient is not finite and tries the next with a lower scale.

    It halves its scale each time. Below 1 it is not the scale that makes the gradient overflow.
    """
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1.0


def loss_terms(outputs: Any) -> dict[str, torch.Tensor]:
    """The loss, its unweighted terms, and what each layer adds to them as TERM/layer_N; scalars without gradient."""
    layers = {
        f"{name}/layer_{number}": loss
        for name, losses in (outputs.layer_losses or {}).items()
        for number, loss in enumerate(losses.unbind())
    }
    terms = {"loss": outputs.loss, **outputs.loss_dict, **layers}
    return {name: term.detach() for name, term in terms.items()}


def forward_together(
    accelerator: Accelerator, model: torch.nn.Module, inputs: dict[str, Any], normalizer: torch.Tensor
) -> Any:
    """One forward pass; a FloatingPointError on one process is one on all, which would else wait for its gradient."""
    inputs = {**inputs, "loss_normalizer": normalizer}
    if is_sharded(model):
        return forward_sharded(accelerator, model, inputs)
    if accelerator.num_processes == 1:
        return model(**inputs)

    # They agree in a hook inside the wrapped model, so that DDP prepares a backward pass on all processes or on none.
    def agree(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        if any_failed(accelerator, outputs is None) and outputs is not None:
            raise FloatingPointError(OTHER_PROCESS)

    hook = accelerator.unwrap_model(model).register_forward_hook(agree, always_call=True)
    try:
        return model(**inputs)
    finally:
        hook.remove()


def forward_sharded(accelerator: Accelerator, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """`forward_together` of a sharded model, which must come to the end of a forward pass that it has begun.

    So an error is caught within the pass, and raised when all processes are through. Autocast is Accelerate's part in
    the models that it wraps.
    """
    forward, errors = model.forward, list[FloatingPointError]()

    def guarded(**inputs: Any) -> Any:
        try:
            return forward(**inputs)
        except FloatingPointError as error:
            errors.append(error)
            return None

    model.forward = guarded
    try:
        with accelerator.autocast():
            outputs = model(**inputs)
    finally:
        del model.forward  # that of the class is seen again
    if any_failed(accelerator, bool(errors)):
        raise errors[0] if errors else FloatingPointError(OTHER_PROCESS)
    return outputs


def any_failed(accelerator: Accelerator, failed: bool) -> bool:
    """Whether one of the processes, all of which make this call, has failed."""
    return bool(accelerator.reduce(torch.tensor(float(failed), device=accelerator.device)) > 0)


@torch.no_grad()
def leave_step(model: torch.nn.Module, optimizer: Any, buffers: list[torch.Tensor]) -> None:
    """Clear the gradients and put back the buffers that the step's forward passes changed (batch norm statistics)."""
    optimizer.zero_grad()
    reshard(model)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def model_inputs(batch: dict[str, Any], step: int) -> dict[str, Any]:
    """What the model is given of a batch, with a seed for each image's random points.

    The seed depends on step and image alone: the points are the same however the images of a step are spread.
    """
    names = ("pixel_values", "pixel_mask", "mask_labels", "class_labels")
    seeds = [zlib.crc32(f"{step}:{image_id}".encode()) for image_id in batch["image_ids"]]
    return {**{name: batch[name] for name in names}, "point_seeds": seeds}
