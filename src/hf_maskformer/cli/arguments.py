"""Arguments that several verbs share."""

from argparse import ArgumentParser, Namespace
from typing import Any


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
