"""Weights, gradients and optimizer state divided among the processes (FSDP; Zhao et al., VLDB 2023).

torch's `fully_shard` is called here, not through Accelerate: that shards nothing on CPUs, and with mixed precision it
casts every floating input of a forward pass, the counts that the losses are divided by too. Here autocast does what it
does without shards. What is evaluated and saved is a whole model on the main process.
"""

import copy
import logging
import os
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

LAUNCH_VARIABLE = "ACCELERATE_USE_FSDP"  # set by `accelerate launch` with a configuration that shards
OFFLOAD_VARIABLE = "FSDP_OFFLOAD_PARAMS"

logger = logging.getLogger(__name__)


def shards_wanted(fsdp: bool) -> bool:
    """Whether this run is sharded: by its option, or by the `accelerate launch` it was started with.

    Call it before an `Accelerator` is made: Accelerate is told that the run is not sharded, so that it does not wrap
    the model, and transformers reads the weights on every process.

    Raises:
        ValueError: the launch asks for weights that lie in the CPU's memory, which there is no support for.
    """
    launched = os.environ.get(LAUNCH_VARIABLE, "false").lower() == "true"
    if not launched:
        return fsdp
    if os.environ.get(OFFLOAD_VARIABLE, "false").lower() == "true":
        raise ValueError(
            f"{OFFLOAD_VARIABLE} is true (fsdp_offload_params in the configuration of `accelerate launch`); it must "
            "be false: weights are not kept in the CPU's memory while a GPU trains"
        )
    os.environ[LAUNCH_VARIABLE] = "false"
    logger.info("sharded as `accelerate launch` asks; its other FSDP settings have no effect")
    return True


class WholeCopy:
    """The whole model that stands for a sharded one where it is evaluated and saved; only on the main process."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model

    def filled(self, sharded: nn.Module, average: dict[str, Tensor] | None = None) -> nn.Module | None:
        """The copy with the weights of `sharded`, or with those of `average` for the parameters it has.

        Every process must make this call; it returns None on all but the main one.
        """
        weights = whole_tensors(sharded.state_dict().items(), keep=self.model is not None)
        if average is not None:
            weights.update(whole_tensors(average.items(), keep=self.model is not None))
        if self.model is not None:
            self.model.load_state_dict(weights)
        return self.model


def shard_model(model: nn.Module, accelerator: Accelerator) -> WholeCopy:
    """Divide the parameters of `model`, which stays the same object on `accelerator.device`, among all processes.

    Each module whose class the model names in `_no_split_modules` is gathered for its forward and backward pass alone;
    what is outside of them is gathered as one. All processes start with the main one's weights.

    Raises:
        ValueError: there is one process only.
    """
    if accelerator.num_processes == 1:
        raise ValueError("fsdp needs more than one process to divide a model among: start it by `accelerate launch`")
    whole = WholeCopy(copy.deepcopy(model) if accelerator.is_main_process else None)
    model.to(accelerator.device)
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, src=0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    units = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed([module for module in model.modules() if type(module).__name__ in units]):
        fully_shard(module, mesh=mesh)  # inner ones first
    fully_shard(model, mesh=mesh)
    if accelerator.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # not every gloo has means
    return whole


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without its backward pass has left gathered; nothing without shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all shards, on every process: a call that all of them make; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """`whole` tensors one after the other, in the CPU's memory; a process that does not `keep` them gets none."""
    kept = {}
    for name, tensor in named:
        gathered = whole(tensor.detach())
        if keep:
            kept[name] = gathered.cpu()
    return kept


def whole_optimizer_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state_dict with `whole_tensors`; without `keep` there are only its groups."""
    stored = optimizer.state_dict()
    state = {index: whole_tensors(entries.items(), keep=keep) for index, entries in stored["state"].items()}
    return {**stored, "state": state if keep else {}}


def divided_as(pattern: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, in the shards of `pattern` where that has shards; a common call."""
    if not isinstance(pattern, DTensor) or isinstance(tensor, DTensor) or tensor.shape != pattern.shape:
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
