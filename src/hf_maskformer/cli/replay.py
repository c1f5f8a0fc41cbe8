"""run a failed training step again and say what is not finite

hf-maskformer replay runs/camvid/failures/step-00001234
hf-maskformer replay runs/camvid/failures/step-00001234 --device cpu

FOLDER is what `hf-maskformer train` writes when a loss or gradient is not finite. The exit code is 1 if the step fails
again, 0 if it does not (another device or version), 2 if the folder cannot be used.
"""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_maskformer.cli.arguments import check_device

if TYPE_CHECKING:
    from hf_maskformer.training.replay import ForwardPass, Replay

MAX_NAMES = 5  # of parameters in one line


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="RUN/failures/step-N")
    parser.add_argument("--device", help="default: a GPU if there is one")


def run(arguments: Namespace) -> None:
    """Raises FloatingPointError, which is exit code 1, if the step fails again."""
    import torch

    from hf_maskformer.training.replay import replay

    check_device(arguments.device)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = replay(Path(arguments.folder), device)
    for line in report(result):
        print(line)
    if result.fails:
        raise FloatingPointError(f"step {result.record['step']} fails again")
    print(f"step {result.record['step']} does not fail on {device}")


def report(result: "Replay") -> list[str]:
    """The lines that `replay` prints."""
    lines = [f"step {result.record['step']}, then: {result.record['error']}"]
    if result.weights:
        lines.append(f"weights before the step that are not finite: {listed(result.weights)}")
    for one in result.passes:
        lines += pass_lines(one)
    if result.gradients:
        lines.append(f"gradient norm: {result.grad_norm:.6g}")
    wrong = [name for name, norm in result.gradients.items() if not math.isfinite(norm)]
    if wrong:
        lines.append(f"gradients that are not finite: {listed(wrong)}")
    return lines


def pass_lines(one: "ForwardPass") -> list[str]:
    lines = [f"process {one.process}, forward pass {one.number}: {', '.join(one.image_ids)}"]
    if one.error is not None:
        lines.append(f"  {one.error}")
    for name, value in one.terms.items():
        then = f" (then {one.recorded[name]:.6g})" if name in one.recorded else ""
        lines.append(f"  {name}: {value:.6g}{then}{'' if math.isfinite(value) else '   <- not finite'}")
    for image_id, names in one.findings.items():
        lines.append(f"  {image_id} alone: {'not finite: ' + ', '.join(names) if names else 'finite'}")
    return lines


def listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
