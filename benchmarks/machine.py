"""The machine of a figure, in words."""

import torch
from accelerate import Accelerator

from hf_maskformer.training.hardware import hardware


def machine() -> str:
    """Such as "CPU (x86_64), 1 thread, AVX512 and AMX": ratios depend on the arithmetic that torch has on a CPU."""
    units = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        units += " and AMX"
    return f"{hardware(Accelerator(cpu=True))}, {units}"
