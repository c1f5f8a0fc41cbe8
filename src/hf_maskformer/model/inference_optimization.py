"""Fewer and faster operations for a model that is only to predict: batch norms folded into their convolutions.

In eval mode a batch norm multiplies and shifts each channel by constants, which the convolution before it can do
itself. Which convolution feeds which norm is seen in one forward pass, so that it works for every backbone, whatever
its modules are called.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .layers import ConvNormActivation

PROBE_SIDE = 64
TOLERANCE = 1e-3  # of the folded model's outputs, measured by their largest entry


class FoldingError(RuntimeError):
    """A folded model predicts something else: a convolution has another reader than its batch norm."""


def optimize(model: Any, *, dtype: torch.dtype | None, channels_last: bool) -> None:
    """Change an eval-mode model in place; see `HfMaskFormerPreTrainedModel.optimize_for_inference`."""
    probe = torch.randn(
        1, model.config.num_channels, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0)
    )
    probe = probe.to(model.device)
    with torch.no_grad():
        expected = _predictions(model, probe)
        for convolution, norm in foldable_pairs(model, probe):
            _fold(model, convolution, norm)
        _check(_predictions(model, probe), expected)
    model.requires_grad_(False)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, ConvNormActivation):
                module.channels_first = False
    if dtype is not None:
        model.to(dtype)


def foldable_pairs(model: nn.Module, probe: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the batch norms that alone read them; both run exactly once in a forward pass."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by id of the output, which is kept so that no other gets its id
    readers: Counter[int] = Counter()
    calls: Counter[nn.Module] = Counter()
    fed: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[module] += 1
        found = made.get(id(inputs[0])) if inputs else None
        if found is None:
            return
        readers[id(inputs[0])] += 1
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            fed.append((found[0], module))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if type(module) is nn.Conv2d:
            made[id(output)] = (module, output)

    leaves = [module for module in model.modules() if type(module) is nn.Conv2d or _is_reader(module)]
    handles = [leaf.register_forward_pre_hook(before) for leaf in leaves]
    handles += [leaf.register_forward_hook(after) for leaf in leaves]
    try:
        model(probe)
    finally:
        for handle in handles:
            handle.remove()
    once = {id(convolution) for convolution, output in made.values() if readers[id(output)] == 1}
    return [(c, n) for c, n in fed if id(c) in once and calls[c] == calls[n] == 1]


def _is_reader(module: nn.Module) -> bool:
    """Modules that compute: without children, or norms that carry their activation (timm's BatchNormAct2d)."""
    return isinstance(module, nn.BatchNorm2d) or not list(module.children())


def _fold(model: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean: Any = norm.running_mean  # not None: norms without statistics are no pairs
    variance: Any = norm.running_var
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    convolution.weight, convolution.bias = weight, bias
    name = next(name for name, module in model.named_modules() if module is norm)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))


def _predictions(model: Any, probe: Tensor) -> tuple[Tensor, ...]:
    output = model(probe)
    return output.class_queries_logits, output.masks_queries_logits


def _check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        difference = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise FoldingError(f"Folding batch norms changed the predictions by {difference:.1e} of their largest.")
