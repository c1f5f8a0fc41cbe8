"""Whether an exported file gives the numbers of the model it was made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_maskformer.export.examples import example_inputs
from hf_maskformer.export.graph import SEMANTIC_MAP, LogitsGraph
from hf_maskformer.model.postprocess import logits_per_image, semantic_map, semantic_scores

TOLERANCE = 1e-3  # of logits, measured by the largest one where that is above 1
LEAST_AGREEMENT = 0.999  # of the pixels of a map of classes: where two classes tie, rounding decides
# Relative changes of the pixels by turns: what float32 holds of one, and ten times that, because noise of pixels
# averages out on the way through a network, where rounding adds up. A grey level is 400 times the larger one.
LAST_DIGITS, TRIALS = (1e-6, 1e-5), 16
MOST_SPREAD = 0.02  # of a model whose own outputs depend on rounding in more places than trials can tell apart
COARSE_SIDE = 8  # cells of the masks by which queries are told apart

Run = Callable[[dict[str, Tensor]], Sequence[Tensor]]


class ExportError(ValueError):
    """The exported file differs from the model."""


@dataclass
class Agreement:
    """Differences of a file's outputs from the model's, by output; of a map of classes, the share of unequal pixels.

    Attributes:
        largest_difference: over all images.
        largest_difference_in_last_digits: where that is above what is allowed, of the same images from the model's
            outputs for pixels that were moved by `LAST_DIGITS`. Empty where no image needed it.
    """

    largest_difference: dict[str, float] = field(default_factory=dict)
    largest_difference_in_last_digits: dict[str, float] = field(default_factory=dict)


def check(run: Run, graph: LogitsGraph, batches: Sequence[dict[str, Tensor]]) -> Agreement:
    """Compare the outputs of `run`, which executes the file, with those of the model.

    Masked attention decides by the sign of a mask logit what a query sees: where one is 0 but for rounding, other
    rounding is another view, and the query's logits may differ by any amount though both programs are right. So an
    image is also in order if the file gives what the model gives for it with its pixels moved by `LAST_DIGITS`. Random
    weights leave more such logits than trials can tell apart; up to `MOST_SPREAD` a file may differ as much as the
    model's own outputs move.

    Raises:
        ExportError: a difference is above what rounding explains; names the output, the size and the difference.
    """
    result = Agreement()
    for inputs in batches:
        with torch.no_grad():
            expected = graph(**inputs)
        found = run(inputs)
        differences = _differences(expected, found, graph)
        limits = {name: 1 - LEAST_AGREEMENT if name in SEMANTIC_MAP else TOLERANCE for name in graph.outputs}
        far = ~(_in_limits(differences, limits) <= 1)  # also where it is not a number
        if far.any():
            nearest, spread = _moved(graph, inputs, expected, found, limits)
            near = _in_limits(nearest, limits) <= 1
            for name, limit in limits.items():
                allowed = limit if name in SEMANTIC_MAP else max(limit, min(MOST_SPREAD, spread[name]))
                _refuse(name, differences[name][~near], allowed, inputs)
                _keep_largest(result.largest_difference_in_last_digits, name, nearest[name][far & near])
        for name in graph.outputs:
            _keep_largest(result.largest_difference, name, differences[name])
    return result


def _refuse(name: str, differences: Tensor, allowed: float, inputs: dict[str, Tensor]) -> None:
    if (differences <= allowed).all():
        return
    images, _, height, width = inputs["pixel_values"].shape
    raise ExportError(
        f"{name} of the exported file differs from the model's by {float(differences.max()):.2g} "
        f"(allowed: {allowed:.0e}) for {images} images of {height}x{width}; no file was kept"
    )


def _keep_largest(largest: dict[str, float], name: str, differences: Tensor) -> None:
    if len(differences):
        largest[name] = max(largest.get(name, 0.0), float(differences.max()))


@torch.no_grad()
def _moved(
    graph: LogitsGraph,
    inputs: dict[str, Tensor],
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    limits: dict[str, float],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """By output: each image's difference of `found` from the nearest of the model's outputs for moved pixels, (B,);
    and how far the model's own outputs moved."""
    generator = torch.Generator().manual_seed(0)
    pixels = inputs["pixel_values"]
    nearest = _differences(expected, found, graph)
    spread = dict.fromkeys(graph.outputs, 0.0)
    for trial in range(TRIALS):
        noise = torch.randn(pixels.shape, generator=generator) * LAST_DIGITS[trial % len(LAST_DIGITS)]
        moved = graph(**{**inputs, "pixel_values": pixels * (1 + noise)})
        differences = _differences(moved, found, graph)
        # Of all outputs of an image together: one trial must explain them.
        worst, so_far = (_in_limits(one, limits) for one in (differences, nearest))
        for name, own in _differences(expected, moved, graph).items():
            nearest[name] = torch.where(worst < so_far, differences[name], nearest[name])
            spread[name] = max(spread[name], float(own.max()))
        if (torch.minimum(worst, so_far) <= 1).all():
            break
    return nearest, spread


def _in_order_of(expected: Sequence[Tensor], found: Sequence[Tensor], graph: LogitsGraph) -> Sequence[Tensor]:
    """The queries of `found` in the order of those of `expected` that they are nearest to: outputs (B, Q, ...).

    Anchored queries stand in the order of their objectness, in which rounding decides between those that are equal.
    """
    if graph.model.config.query_decoder != "anchored" or graph.outputs == SEMANTIC_MAP:
        return found
    ordered = [torch.as_tensor(output).clone() for output in found]
    if not all(output.isfinite().all() for output in ordered):
        return ordered
    for image in range(len(expected[0])):
        # Of their class logits, and of their masks in a few cells.
        sides = [[_coarse(output[image].double()) for output in outputs] for outputs in (expected, ordered)]
        distances = sum(torch.cdist(one, other) for one, other in zip(*sides, strict=True))
        _, order = linear_sum_assignment(torch.as_tensor(distances).numpy())
        for output in ordered:
            output[image] = output[image][torch.from_numpy(order)]
    return ordered


def _coarse(output: Tensor) -> Tensor:
    """(Q, N) of class logits, which they are, or of mask logits (Q, h, w)."""
    return output if output.ndim == 2 else F.adaptive_avg_pool2d(output, COARSE_SIDE).flatten(1)


def equal_pixels(reference: Any, model: Any, processor: Any, images: int = 8) -> float:
    """Share of the pixels of built-in scenes, padding aside, whose most probable class is the same for both models."""
    inputs = example_inputs(processor, None, images)
    with torch.no_grad():
        maps = [_class_maps(one(**inputs), processor.class_activation) for one in (reference, model)]
    equal = [float((first == second).float().mean()) for first, second in zip(*maps, strict=True)]
    return sum(equal) / len(equal)


def _class_maps(outputs: Any, activation: str) -> list[Tensor]:
    """The label of each pixel of the image part, at the size of the mask logits."""
    return [
        semantic_map(semantic_scores(class_logits, mask_logits, activation), size, extent)
        for class_logits, mask_logits, size, extent in logits_per_image(outputs, None)
    ]


def _in_limits(differences: dict[str, Tensor], limits: dict[str, float]) -> Tensor:
    """Each image's largest difference over the outputs, in units of what is allowed, (B,)."""
    return torch.stack([differences[name] / limit for name, limit in limits.items()]).amax(0)


def _differences(expected: Sequence[Tensor], found: Sequence[Tensor], graph: LogitsGraph) -> dict[str, Tensor]:
    """By output, each image's difference, (B,); not a number where shapes differ."""
    ordered = _in_order_of(expected, found, graph)
    return {
        name: _difference(name, actual, wanted, graph.model.config)
        for name, actual, wanted in zip(graph.outputs, ordered, expected, strict=True)
    }


def _difference(name: str, actual: Tensor, wanted: Tensor, config: Any) -> Tensor:
    if actual.shape != wanted.shape:
        return torch.full(wanted.shape[:1], torch.nan)
    if name in SEMANTIC_MAP:
        return (actual != wanted).float().flatten(1).mean(1)
    if name.startswith("masks") and config.query_decoder == "location":  # logits of clamped values
        actual, wanted = actual.sigmoid(), wanted.sigmoid()
    return (actual - wanted).abs().flatten(1).amax(1) / wanted.abs().max().clamp(min=1.0)
