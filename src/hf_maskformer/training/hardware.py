"""What a run was made on, in words, for its metrics.json and its model card."""

import platform

import torch
from accelerate import Accelerator


def hardware(accelerator: Accelerator) -> str:
    """Such as "1 x NVIDIA H100" or "CPU (x86_64), 2 threads"; with several processes on CPUs, how many.

    Processes are taken to have a GPU of one kind each.
    """
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(accelerator.device)}"
    name = "CPU" if accelerator.device.type == "cpu" else accelerator.device.type
    threads = torch.get_num_threads()
    text = f"{name} ({platform.machine()}), {threads} thread{'' if threads == 1 else 's'}"
    return text if count == 1 else f"{count} processes, each on {text}"
