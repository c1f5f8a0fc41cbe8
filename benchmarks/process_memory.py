"""Resident memory of this process, as Linux counts it."""

from pathlib import Path


def resident(field: str) -> int:
    """Bytes: VmRSS = resident now, VmHWM = the most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def reset_peak() -> None:
    """The peak starts anew: importing has its own."""
    Path("/proc/self/clear_refs").write_text("5")
