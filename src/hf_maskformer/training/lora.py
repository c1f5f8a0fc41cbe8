"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) in our own loop, made by PEFT.

The adapters sit inside the model, on the linear layers and convolutions of the chosen parts; their parameters and the
heads' are all that is trained. What is published are the model's own weights with the adapters added to them. A
checkpoint holds the weights without them, and the adapters in a file of their own, so that a resumed run is exact.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training.fine_tuning import check_part, hold_batch_norms, parts_of, rows_of

ADAPTERS_FILE = "adapters.safetensors"  # of a checkpoint
ADAPTER_NAME = "default"
# As PEFT names what it puts into a layer: `query.base_layer.weight`, `query.lora_A.default.weight`.
ADAPTER_WEIGHT = re.compile(r"\.lora_[AB]\.")
# Panoptic SegFormer's sums of attention maps: a few numbers each, and read without a call of the layer.
MASK_SUMS = re.compile(r"\.masks\.(by_level\.\d+|fuse)(\.|$)")
BASE_LAYER = ".base_layer."


def check_peft() -> None:
    """Raises ValueError if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank is set, but the package peft is not installed: pip install hf_maskformer[peft]")


def add_adapters(
    model: HfMaskFormerForUniversalSegmentation, *, rank: int, alpha: int | None, targets: Sequence[str]
) -> None:
    """Put adapters into the parts `targets`; everything but them and the heads is no longer trained.

    They start as a change of nothing. Trained whole are the parts with "head" in their name, the per-pixel
    classifier, and the queries, which go with the classes. Grouped convolutions get no adapters.

    Raises:
        ValueError: PEFT is missing, the model has no such part, it is trained whole, or there is no layer for an
            adapter in it.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    parts = parts_of(model)
    layers: list[str] = []
    for target in targets:
        check_part("lora_targets", target, parts)
        if is_trained_whole(f"model.{target}"):
            raise ValueError(f"lora_targets names {target!r}, which is trained whole: adapters have no effect on it")
        found = adaptable_layers(model, f"model.{target}.")
        if not found:
            raise ValueError(f"lora_targets names {target!r}, which has no linear layer or convolution to adapt")
        layers += found
    settings = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=layers, lora_dropout=0.0)
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER_NAME)
    hold_batch_norms(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER_WEIGHT.search(name) is not None or is_trained_whole(name))


def adaptable_layers(model: HfMaskFormerForUniversalSegmentation, prefix: str) -> list[str]:
    """Names of the linear layers and convolutions below `prefix` that take part in the result."""
    idle = {f"model.backbone.body.{name}" for name in model.model.backbone.idle_parameters}
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix)
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and f"{name}.weight" not in idle
        and not MASK_SUMS.search(name)
    ]


def is_trained_whole(name: str) -> bool:
    part = name.removeprefix("model.").split(".")[0]
    return "head" in part or part == "pixel_classifier" or rows_of(name) is not None or bool(MASK_SUMS.search(name))


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called for the model."""
    return any(ADAPTER_WEIGHT.search(name) for name, _ in model.named_parameters())


@torch.no_grad()
def plain_weights(model: nn.Module, *, merged: bool = True) -> dict[str, Tensor] | None:
    """The state of a model with adapters under the names of one without; None for a model that has none.

    Args:
        merged: add the adapters to the weights of their layers; else they are left out.
    """
    if not has_adapters(model):
        return None
    weights = {
        name.replace(BASE_LAYER, "."): value
        for name, value in model.state_dict().items()
        if not ADAPTER_WEIGHT.search(name)
    }
    if merged:
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                change = module.get_delta_weight(ADAPTER_NAME)
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + change
    return weights


def save_plain(model: Any, folder: Path) -> None:
    """`model.save_pretrained`, with adapters merged into the weights where it has some."""
    weights = plain_weights(model)
    if weights is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)


def save_apart(model: Any, folder: Path, adapters_folder: Path) -> None:
    """`model.save_pretrained`, without its adapters; these go into a file of `adapters_folder`, if there are some."""
    weights = plain_weights(model, merged=False)
    if weights is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
        values = {name: value.contiguous() for name, value in adapter_weights(model).items()}
        save_file(values, adapters_folder / ADAPTERS_FILE)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Fill the adapters of `model` with those in `folder`.

    Raises:
        ValueError: there are none, or they are of other layers.
    """
    path = folder / ADAPTERS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the run was begun without lora_rank, resume it without")
    stored, own = load_file(path), adapter_weights(model)
    if stored.keys() != own.keys():
        raise ValueError(f"{path} holds other adapters than the model: {sorted(stored.keys() ^ own.keys())[:5]}")
    for name, value in own.items():
        value.copy_(stored[name])


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors, without gradient."""
    return {name: value.detach() for name, value in model.named_parameters() if ADAPTER_WEIGHT.search(name)}


def adapt(model: HfMaskFormerForUniversalSegmentation, config: Any, checkpoint: Path | None) -> None:
    """The adapters that `config` asks for, as in the checkpoint where there is one."""
    add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets)
    if checkpoint is not None:
        load_adapters(model, checkpoint)
