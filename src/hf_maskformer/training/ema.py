"""Exponential moving average of the weights (Polyak and Juditsky 1992), kept beside the model that is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_maskformer.training.shards import divided_as

# The decay of update n is at most (1 + n) / (10 + n), so that random first weights are soon forgotten: the rule of
# `num_updates` in TensorFlow's ExponentialMovingAverage.
WARM_UP = (1, 10)


def warm_decay(decay: float, update: int) -> float:
    """The decay of update number `update`, counted from 1; it rises to `decay`."""
    numerator, denominator = WARM_UP
    return min(decay, (numerator + update) / (denominator + update))


class WeightAverage:
    """The average of a model's trainable parameters, in float32 (float64 for float64 parameters).

    Frozen parameters and buffers, such as the statistics of batch norms, have no average: the model's own are used.
    The average starts as the model's weights and lies on their devices, in shards where they do.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.to(wide(value), copy=True) for name, value in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, update: int) -> None:
        """Move the average towards the weights of `model`; `update` counts the optimizer steps taken, from 1."""
        weight = 1.0 - warm_decay(self.decay, update)
        for name, value in trainable(model).items():
            average = self.shadow[name]
            average.lerp_(value.to(average.dtype), weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let `model` hold the averaged weights inside the block; its own come back exactly, after an error too."""
        parameters = trainable(model)
        own = {name: value.clone() for name, value in parameters.items()}
        try:
            copy_into(parameters, self.shadow)
            yield
        finally:
            copy_into(parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; tensors of this object, not copies."""
        return self.shadow

    def load_state_dict(self, stored: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, or the whole tensors of what it gave in shards.

        Raises:
            ValueError: `stored` has the averages of other parameters.
        """
        odd = sorted(set(stored) ^ set(self.shadow))
        if odd:
            raise ValueError(f"the averaged weights are of other parameters than this model's; differing: {odd[:5]}")
        copy_into(self.shadow, stored)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The values of the parameters that require a gradient, by name, shared ones once; writing to them is allowed."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def wide(value: Tensor) -> torch.dtype:
    """bfloat16 has too few digits to add a ten-thousandth of a difference."""
    return torch.promote_types(value.dtype, torch.float32)


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(divided_as(target, sources[name]))
