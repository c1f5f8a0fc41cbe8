"""Whether a training step fits into the memory: a GPU's, by its allocator, or the machine's, by what Linux counts."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

MARGIN = 0.15  # of the memory, left for what a step does not show: readers of images, evaluation, fragments


def memory_check(step: Callable[[int], None], accelerator: Accelerator) -> Callable[[int], bool]:
    """Whether `step(size)` fits into the memory of the accelerator's device."""
    if accelerator.device.type == "cpu":
        return CpuMemory(step, num_processes=accelerator.num_processes)
    return DeviceMemory(step, accelerator.device)


class DeviceMemory:
    """A step fits if it ends, and on CUDA if it also leaves `MARGIN` of the memory that this process can have."""

    def __init__(self, step: Callable[[int], None], device: torch.device) -> None:
        self.step, self.device = step, device

    def __call__(self, size: int) -> bool:
        free_memory(self.device)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            limit = (1 - MARGIN) * (torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device))
        try:
            self.step(size)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
                raise
            return False
        return not cuda or torch.cuda.max_memory_reserved(self.device) <= limit


class CpuMemory:
    """A step fits if the process's resident memory grows by less than its share of what is available, less `MARGIN`.

    A size whose need, extrapolated from the sizes before it, is too much is not tried: the system would end the run.
    """

    def __init__(self, step: Callable[[int], None], *, num_processes: int) -> None:
        self.step = step
        self.limit = (1 - MARGIN) * available_memory() / num_processes
        self.before = process_memory("VmRSS")
        self.measured: list[tuple[int, float]] = []  # images and bytes

    def __call__(self, size: int) -> bool:
        if expected_memory(size, self.measured) > self.limit:
            return False
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        try:
            self.step(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return False
        needed = process_memory("VmHWM") - self.before
        self.measured.append((size, needed))
        return needed <= self.limit


def expected_memory(size: int, measured: Sequence[tuple[int, float]]) -> float:
    """Bytes for `size` images on the line through the last two measurements; 0 without any."""
    if len(measured) < 2:
        return sum(needed * size / images for images, needed in measured)
    (one, less), (other, more) = measured[-2:]
    return max(more, more + (more - less) * (size - other) / (other - one))


def process_memory(field: str) -> int:
    """Bytes: VmRSS = resident now, VmHWM = the most since the peak was reset; ValueError without Linux's /proc."""
    path = Path("/proc/self/status")
    if not path.is_file():
        raise ValueError(
            "batch_size auto: on a CPU it needs Linux, whose /proc says how much memory there is: give a number"
        )
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(f"{field}:"))


def available_memory() -> int:
    """Bytes that the machine, and the container if this is one, can still give; ValueError without Linux's /proc."""
    process_memory("VmRSS")
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    most = group / "memory.max"
    if most.is_file() and most.read_text().strip().isdigit():
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        used = int((group / "memory.current").read_text()) - cached
        available = min(available, int(most.read_text()) - used)
    return available


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
