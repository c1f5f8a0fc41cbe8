"""AdamW groups by parameter name, and the learning rate as a pure function of step and progress.

MaskFormer trains the backbone with a tenth of the learning rate (ResNet) or the same (Swin), and decays no norm, bias,
embedding or position table (Cheng et al., NeurIPS 2021, section 4 and the released configurations).
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

BACKBONE_PREFIX = "model.backbone."
POLY_POWER = 0.9  # MaskFormer, section 4.1: "poly" learning rate schedule
# Last component of a parameter's name that holds an embedding or a position table rather than a weight matrix.
NO_DECAY_NAME = re.compile(r"embed|position|token|relative_position_bias_table")


def parameter_groups(
    model: nn.Module, *, learning_rate: float, backbone_multiplier: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Up to four groups, {backbone, rest} x {decayed, not}, each with the `parameter_names` it holds, in model order.

    Parameters that do not require a gradient are left out; shared ones appear once.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{module_name}.{name}" if module_name else name
            in_backbone = full_name.startswith(BACKBONE_PREFIX)
            decayed = is_decayed(module, name, parameter)
            group = groups.setdefault(
                (in_backbone, decayed),
                {
                    "params": [],
                    "parameter_names": [],
                    "lr": learning_rate * (backbone_multiplier if in_backbone else 1.0),
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
            group["parameter_names"].append(full_name)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return list(groups.values())


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """One-dimensional parameters are biases, norm scales and layer scales; the rest is told by type and name."""
    if parameter.ndim <= 1 or isinstance(module, nn.Embedding):
        return False
    return NO_DECAY_NAME.search(name) is None


def build_optimizer(
    model: nn.Module, *, learning_rate: float, backbone_multiplier: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; each group keeps its full rate as `initial_lr`, see `set_learning_rate`."""
    groups = parameter_groups(
        model, learning_rate=learning_rate, backbone_multiplier=backbone_multiplier, weight_decay=weight_decay
    )
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(schedule: str, *, step: int, progress: float, warmup_steps: int) -> float:
    """The part of the full learning rate used for step `step` (from 0) when `progress` (0..1) of the budget is spent.

    Progress, not the step count, drives the decay: under a budget in minutes the number of steps is not known before.
    """
    progress = min(max(progress, 0.0), 1.0)
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if schedule == "poly":
        return warmup * (1.0 - progress) ** POLY_POWER
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "constant":
        return warmup
    raise ValueError(f"schedule is {schedule!r}; allowed: poly, cosine, constant")


def set_learning_rate(param_groups: Iterable[dict[str, Any]], factor: float) -> None:
    for group in param_groups:
        group["lr"] = group["initial_lr"] * factor
