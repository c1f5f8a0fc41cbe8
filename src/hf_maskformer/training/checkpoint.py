"""Checkpoints that are whole or absent: written beside their place, renamed into it, never pickled.

A checkpoint is a directory `step-00000100/` with `model/` (model and processor, loadable by from_pretrained),
`optimizer.safetensors` (the tensors of the optimizer's state), `ema.safetensors` (the averaged weights, where they are
kept), `adapters.safetensors` (those of LoRA, which `model/` is without) and `state.json` (everything else). One that a
full disk, a copy or a crash of the machine cut off is known by the sizes of its files, which `state.json` holds and
tensor files state themselves, and passed over. What is renamed into place is on the disk before.
"""

import errno
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_maskformer.training.lora import ADAPTERS_FILE, save_apart, save_plain
from hf_maskformer.training.shards import divided_as

MODEL_FOLDER = "model"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "ema.safetensors"
CHECKPOINT_NAME = re.compile(r"step-(\d{8})")
UNFINISHED_SUFFIX = ".unfinished"
REPLACED_SUFFIX = ".replaced"
REMOVED_SUFFIX = ".removed"
LEFTOVER_NAME = re.compile(rf"\.{CHECKPOINT_NAME.pattern}\.(unfinished|replaced|removed)")
# What file systems answer that cannot be told to write a directory, and Windows for a file that may only be read.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
MIB = 2**20

logger = logging.getLogger(__name__)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(directory)` on a fresh neighbour of `path` and rename it to `path`; an old one is replaced whole.

    A process killed at any moment leaves the old directory, the new one, or (between the two renames) the old one
    under the name `.NAME.replaced`, which `restore_replaced` puts back. Where `write` fails, the old one stays and the
    unfinished one is removed. Content and names are on the disk, not in a cache alone, when this returns.

    Raises:
        OSError: the directory could not be written; names it and the free space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{UNFINISHED_SUFFIX}")
    replaced = path.with_name(f".{path.name}{REPLACED_SUFFIX}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write(unfinished)
        for part in unfinished.rglob("*"):
            sync(part)
        sync(unfinished)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):  # safetensors has an error of its own for a full disk
            raise not_written(path, error) from error
        raise
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk; where that can be asked for."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    writable = os.name == "nt" and os.access(path, os.W_OK)  # Windows writes back only what was opened to be written
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def not_written(path: Path, error: Exception) -> OSError:
    """`error` with what was to be written and how much room there is."""
    free = shutil.disk_usage(path.parent).free // MIB
    message = f"{path} could not be written, {free} MiB are free there: {error}"
    number = error.errno if isinstance(error, OSError) else None
    return OSError(message) if number is None else OSError(number, message)


def restore_replaced(path: Path) -> None:
    """Undo a replacement of `path` that was cut off between its two renames."""
    replaced = path.with_name(f".{path.name}{REPLACED_SUFFIX}")
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; OSError, naming it and the free space, leaves the old one."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED_SUFFIX}")
    try:
        unfinished.write_text(text)
        sync(unfinished)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise not_written(path, error) from error
    os.replace(unfinished, path)
    sync(path.parent)


def save_model(path: Path, model: Any, processor: Any) -> None:
    """Model and processor in one directory that `from_pretrained` reads."""

    def write(directory: Path) -> None:
        save_plain(model, directory)
        processor.save_pretrained(directory)

    write_directory(path, write)


def save_checkpoint(
    folder: Path,
    *,
    model: Any,
    processor: Any,
    optimizer_state: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    average: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` (N = `state["step"]`), then delete what `remove_old` does.

    `optimizer_state` is an optimizer's state_dict. `average` holds the averaged weights by parameter name, where the
    run keeps them; `model` has its own.
    """
    path = folder / f"step-{state['step']:08d}"

    def write(directory: Path) -> None:
        save_apart(model, directory / MODEL_FOLDER, directory)
        processor.save_pretrained(directory / MODEL_FOLDER)
        tensors, plain = split_state(optimizer_state)
        save_file(tensors, directory / OPTIMIZER_FILE)
        if average is not None:
            save_file({name: value.contiguous() for name, value in average.items()}, directory / AVERAGE_FILE)
        stored = {**state, "files": file_sizes(directory), "optimizer": plain}
        (directory / STATE_FILE).write_text(json.dumps(stored, indent=2))

    write_directory(path, write)
    remove_old(folder, keep=keep)
    return path


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of all files in a directory and below it, by their relative paths."""
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def remove_old(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` (at least 1) whole checkpoints, and what a killed process left.

    That is what was being written, replaced or deleted then, and checkpoints that are not whole and older than the
    newest whole one. Newer ones stay, and where none is whole all of them.
    """
    for path in folder.iterdir():
        if LEFTOVER_NAME.fullmatch(path.name):
            shutil.rmtree(path)
    whole = checkpoints(folder)
    kept = whole[-max(1, keep) :]
    for path in checkpoint_folders(folder):
        if kept and path not in kept and path < kept[-1]:
            # Under another name first: a checkpoint is whole or absent, while it is deleted too.
            removed = path.with_name(f".{path.name}{REMOVED_SUFFIX}")
            path.rename(removed)
            shutil.rmtree(removed)


def store_progress(folder: Path, step: int, progress: dict[str, Any]) -> None:
    """Replace "progress" in the state of the checkpoint of `step`."""
    checkpoint = folder / f"step-{step:08d}"
    write_text(checkpoint / STATE_FILE, json.dumps({**load_state(checkpoint), "progress": progress}, indent=2))


def checkpoint_folders(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, oldest first. Unfinished directories have other names and are not seen."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if CHECKPOINT_NAME.fullmatch(path.name))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(folder) if damage(path) is None]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; a warning names each newer one that is not."""
    for path in reversed(checkpoint_folders(folder)):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is not whole and passed over: %s", path, problem)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is missing or cut off in a checkpoint; None for a whole one. Of tensors only the files' sizes are read.

    Of the first versions' checkpoints, which do not list their files, a missing file can go unnoticed.
    """
    model = checkpoint / MODEL_FOLDER
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        return f"{model} holds no weights"
    for path in (*weights, checkpoint / OPTIMIZER_FILE, checkpoint / AVERAGE_FILE, checkpoint / ADAPTERS_FILE):
        if path.name in (AVERAGE_FILE, ADAPTERS_FILE) and not path.exists():
            continue
        problem = tensor_file_damage(path)
        if problem is not None:
            return problem
    for path in (*sorted(model.glob("*.json")), checkpoint / STATE_FILE):
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return f"{path.name} cannot be read ({error})"
    for name, expected in load_state(checkpoint).get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected:
            return f"{path.name} has {path.stat().st_size} bytes instead of {expected}"
    return None


def tensor_file_damage(path: Path) -> str | None:
    """Whether a safetensors file has the length that its header states: 8 bytes, a JSON header, the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error) as error:
        return f"{path.name} cannot be read ({error})"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state` (the optimizer's part stays under "optimizer")."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{checkpoint / STATE_FILE} is not JSON ({error}); delete {checkpoint} to use an older one"
        ) from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Fill `optimizer`, built over the same parameters in the same order; where those are sharded, its state is.

    Raises:
        ValueError: the stored groups hold other parameter names.
    """
    plain = load_state(checkpoint)["optimizer"]
    for stored, group in zip(plain["param_groups"], optimizer.param_groups, strict=True):
        if stored["parameter_names"] != group["parameter_names"]:
            odd = sorted(set(stored["parameter_names"]) ^ set(group["parameter_names"]))
            raise ValueError(f"{checkpoint} was written for other parameters than this model's; differing: {odd[:5]}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(checkpoint / OPTIMIZER_FILE).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = divided_as(parameters[int(index)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def load_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights by parameter name.

    Raises:
        ValueError: the run that wrote the checkpoint kept none.
    """
    path = checkpoint / AVERAGE_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the run was begun without ema_decay, resume it without")
    return load_file(path)


def split_state(state_dict: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by "INDEX.NAME" and JSON-ready groups.

    Raises:
        ValueError: a state entry is not a tensor (no optimizer used here has one).
    """
    tensors = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"optimizer state {index}.{name} is a {type(value).__name__}; only tensors can be saved"
                )
            tensors[f"{index}.{name}"] = value.detach().contiguous()
    return tensors, {"param_groups": state_dict["param_groups"]}
