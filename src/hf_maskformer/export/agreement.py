"""Whether an exported file gives the numbers of the model it was made of."""

from collections.abc import Callable, Sequence
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
LAST_DIGITS, TRIALS = 1e-6, 4  # relative change of the pixels, as large as what float32 loses on the way
MOST_SPREAD = 0.02  # of a model whose own outputs depend on rounding
COARSE_SIDE = 8  # cells of the masks by which queries are told apart

Run = Callable[[dict[str, Tensor]], Sequence[Tensor]]


class ExportError(ValueError):
    """The exported file differs from the model."""


def check(run: Run, graph: LogitsGraph, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The largest difference of each output over the batches; of a map of classes, the share of unequal pixels.

    Raises:
        ExportError: a difference is above what rounding explains; names the output, the size and the difference.
    """
    worst: dict[str, float] = {}
    for inputs in batches:
        with torch.no_grad():
            expected = graph(**inputs)
        found = _in_order_of(expected, run(inputs), graph)
        for name, actual, wanted in zip(graph.outputs, found, expected, strict=True):
            difference = _difference(name, actual, wanted, graph.model.config)
            allowed = 1 - LEAST_AGREEMENT if name in SEMANTIC_MAP else TOLERANCE
            if not difference <= allowed and name not in SEMANTIC_MAP:
                allowed = max(allowed, min(MOST_SPREAD, _own_spread(graph, inputs, expected)[name]))
            if not difference <= allowed:  # also where it is not a number
                images, _, height, width = inputs["pixel_values"].shape
                raise ExportError(
                    f"{name} of the exported file differs from the model's by {difference:.2g} "
                    f"(allowed: {allowed:.0e}) for {images} images of {height}x{width}; no file was kept"
                )
            worst[name] = max(worst.get(name, 0.0), difference)
    return worst


@torch.no_grad()
def _own_spread(graph: LogitsGraph, inputs: dict[str, Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """How far the model's own outputs move when its images change in their last digits, by `LAST_DIGITS`.

    Masked attention decides by the sign of a mask logit what a query sees: where one is 0 but for rounding, other
    rounding is another view, and class logits may differ by more than `TOLERANCE` though both programs are right.
    """
    generator = torch.Generator().manual_seed(0)
    spread = dict.fromkeys(graph.outputs, 0.0)
    for _ in range(TRIALS):
        pixels = inputs["pixel_values"]
        noise = torch.randn(pixels.shape, generator=generator) * LAST_DIGITS
        moved = _in_order_of(expected, graph(**{**inputs, "pixel_values": pixels * (1 + noise)}), graph)
        for name, actual, wanted in zip(graph.outputs, moved, expected, strict=True):
            spread[name] = max(spread[name], _difference(name, actual, wanted, graph.model.config))
    return spread


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


def _difference(name: str, actual: Tensor, wanted: Tensor, config: Any) -> float:
    if actual.shape != wanted.shape:
        return float("nan")
    if name in SEMANTIC_MAP:
        return float((actual != wanted).float().mean())
    if name.startswith("masks") and config.query_decoder == "location":  # logits of clamped values
        actual, wanted = actual.sigmoid(), wanted.sigmoid()
    return float((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
