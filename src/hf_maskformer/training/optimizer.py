"""AdamW groups by parameter name, and the learning rate as a pure function of step and progress.

MaskFormer trains the backbone with a tenth of the learning rate (ResNet) or the same (Swin), and decays no norm, bias,
embedding or position table (Cheng et al., NeurIPS 2021, section 4 and the released configurations). Mask2Former does
the same. Panoptic SegFormer also trains what places are computed from with a tenth of the rate: `is_placing`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hf_maskformer.model.query_decoder_location import LocationQueryDecoder
from hf_maskformer.training.layer_decay import layer_scales

BACKBONE_PREFIX = "model.backbone."
BACKBONE_BODY_PREFIX = "model.backbone.body."
POLY_POWER = 0.9  # MaskFormer, section 4.1: "poly" learning rate schedule
STEP_FACTOR = 0.1  # Mask2Former, section 4.1: multiplied at the fractions 0.9 and 0.95 of the training steps
# Last component of a parameter's name that holds an embedding or a position table rather than a weight matrix.
NO_DECAY_NAME = re.compile(r"embed|position|token|relative_position_bias_table")
# Deformable DETR (Zhu et al., ICLR 2021, section 5) and, after it, Panoptic SegFormer; Mask2Former's code does not.
PLACING_NAME = re.compile(r"\b(sampling_offsets|reference_points)\.")
PLACING_MULTIPLIER = 0.1


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    backbone_multiplier: float,
    weight_decay: float,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Up to four groups, {backbone, rest} x {decayed, not}, each with the `parameter_names` it holds, in model order.

    Parameters that do not require a gradient are left out; shared ones appear once. With `layer_decay` the backbone's
    groups are split further, by depth; so is the rest in a model with a location decoder, by `is_placing`.

    Raises:
        ValueError: no parameter requires a gradient, or `layer_decay` is given for a backbone of unknown depth or
            one that is not trained.
    """
    scales = {} if layer_decay is None else backbone_scales(model, layer_decay)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    located = any(isinstance(module, LocationQueryDecoder) for module in model.modules())
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{module_name}.{name}" if module_name else name
            in_backbone = full_name.startswith(BACKBONE_PREFIX)
            decayed = is_decayed(module, name, parameter)
            scale = PLACING_MULTIPLIER if located and is_placing(full_name) else scales.get(full_name, 1.0)
            group = groups.setdefault(
                (in_backbone, decayed, scale),
                {
                    "params": [],
                    "parameter_names": [],
                    "lr": learning_rate * ((backbone_multiplier if in_backbone else 1.0) * scale),
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
            group["parameter_names"].append(full_name)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return list(groups.values())


def backbone_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """`layer_scales` of the trainable parameters of the backbone proper, without a pyramid neck behind it.

    Raises:
        ValueError: there are none.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    body = [name for name in trainable if name.startswith(BACKBONE_BODY_PREFIX)]
    if not body:
        raise ValueError(f"layer_decay is {layer_decay}, but no parameter of the backbone is trained")
    return layer_scales(body, layer_decay)


def is_placing(name: str) -> bool:
    """Whether a parameter says where deformable attention looks; in a backbone nothing does."""
    return PLACING_NAME.search(name) is not None and not name.startswith(BACKBONE_PREFIX)


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """One-dimensional parameters are biases, norm scales and layer scales; the rest is told by type and name."""
    if parameter.ndim <= 1 or isinstance(module, nn.Embedding):
        return False
    return NO_DECAY_NAME.search(name) is None


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    backbone_multiplier: float,
    weight_decay: float,
    layer_decay: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; each group keeps its full rate as `initial_lr`, see `set_learning_rate`."""
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        backbone_multiplier=backbone_multiplier,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(
    schedule: str, *, step: int, progress: float, warmup_steps: int, schedule_steps: Sequence[float] = ()
) -> float:
    """The part of the full learning rate used for step `step` (from 0) when `progress` (0..1) of the budget is spent.

    Progress, not the step count, drives the decay: under a budget in minutes the number of steps is not known before.
    "step" multiplies by `STEP_FACTOR` at each of the `schedule_steps`, which are progress too.
    """
    progress = min(max(progress, 0.0), 1.0)
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if schedule == "poly":
        return warmup * (1.0 - progress) ** POLY_POWER
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "constant":
        return warmup
    if schedule == "step":
        return warmup * STEP_FACTOR ** sum(progress >= fraction for fraction in schedule_steps)
    raise ValueError(f"schedule is {schedule!r}; allowed: poly, cosine, step, constant")


def set_learning_rate(param_groups: Iterable[dict[str, Any]], factor: float) -> None:
    for group in param_groups:
        group["lr"] = group["initial_lr"] * factor
