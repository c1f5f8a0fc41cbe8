"""One `hf-maskformer train` in a forked process that can be killed, and what it was doing when it was.

The parent has imported everything and computed nothing, so a fork is a fresh process without the seconds of start-up.
The forked process notes what it does in memory that outlives it.
"""

import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from hf_maskformer.cli.main import main
from hf_maskformer.training import run as run_module
from hf_maskformer.training import train as train_module

# What a process is doing, by the function it is in; "between" is everything else after the first step.
STARTING, BETWEEN = "starting", "between"
WATCHED = (
    (train_module, "training_step", "step"),
    (run_module, "save_checkpoint", "checkpoint"),
    (run_module, "store_progress", "progress"),
    (run_module, "save_model", None),  # named by the folder it writes: best or final
    (run_module, "evaluate", "evaluation"),
    (run_module, "sample_sheet", "samples"),
    (run_module, "draw_curves", "curves"),
)
DOINGS = (STARTING, BETWEEN, "step", "checkpoint", "progress", "best", "final", "evaluation", "samples", "curves")
UNFINISHED_MARKS = (".unfinished", ".replaced")
SESSION_FIELD = 3  # of /proc/PID/stat behind the name in brackets; the first one there is the state
ZOMBIE = "Z"
POLL_SECONDS = 0.0005
NO_STEP = -1


class Board:
    """Step and activity of a forked process; a kill in the middle of a write cannot damage them."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forked processes

    def clear(self) -> None:
        self.memory[:9] = struct.pack("q", NO_STEP) + bytes(1)

    @property
    def doing(self) -> str:
        return DOINGS[self.memory[8]]

    @property
    def step(self) -> int | None:
        """The last step that was begun; None before the first one of this process."""
        step = struct.unpack("q", self.memory[:8])[0]
        return None if step == NO_STEP else step

    def marked(self, function: Callable[..., Any], doing: str | None) -> Callable[..., Any]:
        """`function`, noted while it runs."""

        @wraps(function)
        def noted(*args: Any, **keywords: Any) -> Any:
            outside = self.memory[8]
            if doing == "step":
                self.memory[:8] = struct.pack("q", keywords["step"])
            self.memory[8] = DOINGS.index(doing or args[0].name)
            try:
                return function(*args, **keywords)
            finally:
                self.memory[8] = max(outside, DOINGS.index(BETWEEN))

        return noted


class ForkedRun:
    """`hf-maskformer ARGUMENTS...` in a new process, which leads a session of its own."""

    def __init__(self, arguments: list[str], output: Path, board: Board) -> None:
        board.clear()
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            run_and_exit(arguments, output, board)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self) -> None:
        while self.running():
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL, to this process alone as the kernel does when memory runs out; its readers have to notice."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def survivors(self) -> list[int]:
        """Living processes of the session: the readers, and the process itself."""
        return [pid for pid, (state, session) in processes() if session == self.pid and state != ZOMBIE]


def run_and_exit(arguments: list[str], output: Path, board: Board) -> None:
    """The forked process; never returns, so that nothing of its parent runs twice."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        for module, name, doing in WATCHED:
            setattr(module, name, board.marked(getattr(module, name), doing))
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def processes() -> list[tuple[int, tuple[str, int]]]:
    """(state, session) of each process; those that end meanwhile are left out."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                found.append((int(entry), (fields[0], int(fields[SESSION_FIELD]))))
    return found


def half_written(run: Path) -> set[str]:
    """What lies in the run's folder under the name of something unfinished or replaced."""
    found = set()
    checkpoints = run / "checkpoints"
    with suppress(FileNotFoundError):  # of a folder that is not there yet, or was just renamed
        for folder in (run, checkpoints, *checkpoints.glob("step-*")):
            with suppress(FileNotFoundError):
                names = os.listdir(folder)
                found |= {str((folder / name).relative_to(run)) for name in names if name.endswith(UNFINISHED_MARKS)}
    return found


def kill_after(process: ForkedRun, seconds: float) -> bool:
    """Kill it after this time; False if it ended before."""
    while process.running():
        if process.seconds() >= seconds:
            process.kill()
            return process.code == -signal.SIGKILL
        time.sleep(POLL_SECONDS)
    return False


def kill_while_writing(process: ForkedRun, run: Path, *, passed_over: int, delay: float) -> bool:
    """Kill it `delay` seconds after something half-written appears, `passed_over` times not; False if it ended."""
    known, count = half_written(run), 0
    while process.running():
        names = half_written(run)
        count += bool(names - known)
        known = names
        if count > passed_over:
            return kill_after(process, process.seconds() + delay)
        time.sleep(POLL_SECONDS)
    return False
