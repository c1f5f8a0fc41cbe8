"""Arguments that several verbs share."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Arguments of `hf_maskformer.data.load.load` with a flag of their own.
FLAGS_OF_LOAD = {"path_or_id": "--dataset", "split": "--split", "task": "--task", "format": "--format"}
ON_BAD_SAMPLE = "on_bad_sample"


def add_input_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--intensity-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values scaled to 0..255; needed for 16-bit and float images, which are refused without it",
    )


def intensity_range(arguments: Namespace) -> tuple[float, float] | None:
    if arguments.intensity_range is None:
        return None
    low, high = arguments.intensity_range
    if not low < high:
        raise ValueError(f"--intensity-range is {low} {high}; LOW must be smaller than HIGH")
    return low, high


def reader_options(arguments: Namespace) -> dict[str, Any]:
    """Options of `hf_maskformer.data.load.load` that come from shared flags."""
    values = intensity_range(arguments)
    return {} if values is None else {"intensity_range": values}


def dataset_options(given: Mapping[str, Any], on_bad_sample: str | None) -> tuple[dict[str, Any], str]:
    """The options of the reader among those `given` as KEY=VALUE, and what happens to bad samples.

    Args:
        given: what `key_values` read; may hold on_bad_sample too.
        on_bad_sample: the flag, None if it was not given.

    Raises:
        ValueError: an option has a flag of its own, or on_bad_sample is said twice and differently.
    """
    options = dict(given)
    for name, flag in FLAGS_OF_LOAD.items():
        if name in options:
            raise ValueError(f"--dataset-options {name}={options[name]}: use {flag} instead")
    policy = options.pop(ON_BAD_SAMPLE, None)
    if policy is not None and on_bad_sample not in (None, policy):
        raise ValueError(
            f"on_bad_sample is {policy!r} in --dataset-options but --on-bad-sample is {on_bad_sample!r}: give one"
        )
    return options, str(policy or on_bad_sample or "raise")


def check_counts(**values: int | None) -> None:
    """Raises ValueError for a flag (batch_size is --batch-size) that is given and below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def check_device(name: str | None) -> None:
    """Raises ValueError for a --device that this machine does not have; None, the default, is allowed."""
    import torch

    if name is None:
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
        known = any(device == torch.device(one) or name == torch.device(one).type for one in there)
    except RuntimeError:  # no name of a device
        known = False
    if not known:
        raise ValueError(f"--device {name!r} is not there; devices of this machine: {', '.join(there)}")


def check_output_file(flag: str, path: str | None) -> None:
    """Raises ValueError where a file cannot be written; it may exist, and its folders need not."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder; it must be a file")
    check_output_folder(flag, str(Path(path).parent))
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written to")


def check_output_folder(flag: str, path: str | None) -> None:
    """Raises ValueError where a folder cannot be made or written to."""
    if path is None:
        return
    there = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {path}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{flag} {path}: {there} cannot be written to")
