"""torch.compile of the parts that have no data-dependent steps: backbone, pixel decoder, query decoder.

The criterion stays eager: its matching copies costs to the host, where the graph would break. The parts are compiled
in place, so that parameters keep their names and checkpoints stay loadable.
"""

from typing import Any

import torch
from torch import nn

COMPILED_PARTS = ("backbone", "pixel_decoder", "query_decoder")


def compile_parts(model: Any, device: torch.device) -> None:
    """Let the parts of `model`, a `HfMaskFormerForUniversalSegmentation`, be compiled at their first forward pass.

    Raises:
        ValueError: nothing can be compiled for `device` here; says why.
    """
    check_compiler(device)
    for name in COMPILED_PARTS:
        part: nn.Module = getattr(model.model, name)
        part.compile()


def check_compiler(device: torch.device) -> None:
    """Compile a function of one line: a compiler for C++ (CPU) or Triton (GPU) may be missing, or Python too new."""
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # the compiler's errors have no common class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"compile is on, but torch.compile does not work here for {device.type}: {reason[0]}; install what is "
            "missing (a C++ compiler for the CPU, Triton for a GPU) or leave compile off"
        ) from error
