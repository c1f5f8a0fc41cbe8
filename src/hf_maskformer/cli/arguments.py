"""Arguments that several verbs share."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
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
