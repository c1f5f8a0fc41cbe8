"""Post-processing beside transformers' MaskFormerImageProcessor: the same outputs in, a map for each image out.

`realistic_outputs` draws what a trained model gives, seeded: smooth masks that are sure of themselves, sure classes.
A canvas is divided among areas of stuff (the highest of smooth random fields) and covered by objects (ellipses, the
later in front of the earlier); each has one query. Its mask logit is the signed distance to its outline in cells,
squeezed by tanh to +-MASK_LOGIT, so that an outline is as wide as a trained model makes it, about two cells, and a
smooth disturbance is added. Some objects have a second query with a shifted mask and less certain class. The
remaining queries are "no object" with a low and smooth mask. `noise_outputs` is the opposite, independent noise in
every cell and class: hardly anything can be ruled out, and every cell has to be interpolated.

For semantic maps the difference that is printed is the share of pixels that differ. In instance and panoptic
segmentation transformers' rules are others (masks cut at the size of the logits, thresholds on score x probability,
no overlap rule for instances): there it is the share of pixels with another label, and only guards against a
comparison of different work.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from speed_cases import NUM_LABELS, PEER, Case
from torch import Tensor
from transformers import MaskFormerImageProcessor
from transformers.utils import ModelOutput

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

IMAGES, QUERIES, STRIDE = 4, 100, 4
STUFF, THINGS, SECOND_QUERIES = 6, 14, 8
MASK_LOGIT = 8.0
VOID = -1


def semantic_case(
    size: int,
    *,
    target: tuple[int, int],
    aim: float | None,
    realistic: bool = True,
    peak_aim: float | None = None,
) -> Case:
    """Class and mask logits to int64 maps of labels."""
    outputs = outputs_of(size, realistic)
    calls = sides("post_process_semantic_segmentation", outputs, [target] * IMAGES)

    def difference() -> float:
        return share_that_differs(calls["ours"](), calls[PEER]())

    inputs = tuple(outputs.values()) if realistic else ()
    title = title_of("semantic maps", target, realistic)
    return Case(title, calls, difference, allowed=1e-5, aim=aim, inputs=inputs, peak_aim=peak_aim)


def segments_case(
    size: int, method: str, *, target: tuple[int, int], aim: float | None, realistic: bool = True
) -> Case:
    """Class and mask logits to int maps of segment ids and the list of segments; default thresholds on both sides.

    Ours also encodes each instance's whole mask as COCO RLE and drops instances that are mostly hidden.
    """
    outputs = outputs_of(size, realistic)
    fuse = {"label_ids_to_fuse": set()} if method == "panoptic" else {}
    calls = sides(f"post_process_{method}_segmentation", outputs, [target] * IMAGES, **fuse)

    def difference() -> float:
        maps = {side: [label_map(result) for result in call()] for side, call in calls.items()}
        return share_that_differs(maps["ours"], maps[PEER])

    title = title_of(f"{method} segments", target, realistic)
    return Case(title, calls, difference, allowed=0.1 if realistic else 1.0, aim=aim)


def title_of(what: str, target: tuple[int, int], realistic: bool) -> str:
    kind = "" if realistic else ", independent noise as outputs"
    return f"{what}, {IMAGES} images, {QUERIES} queries, {NUM_LABELS} classes, to {target[0]}x{target[1]}{kind}"


def sides(
    method: str, outputs: ModelOutput, sizes: list[tuple[int, int]], **settings: Any
) -> dict[str, Callable[[], Any]]:
    processors = {"ours": HfMaskFormerImageProcessor(), PEER: MaskFormerImageProcessor()}

    def call(processor: Any) -> Any:
        with torch.inference_mode():
            return getattr(processor, method)(outputs, target_sizes=sizes, **settings)

    return {side: (lambda processor=processor: call(processor)) for side, processor in processors.items()}


def share_that_differs(maps: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one != other).float().mean()) for one, other in zip(maps, others, strict=True))


def label_map(result: dict[str, Any]) -> Tensor:
    """Label of each pixel's segment, VOID where there is none (transformers' id there: -1 of instances, else 0)."""
    ids = result["segmentation"].long()
    labels = torch.full_like(ids, VOID)
    for segment in result["segments_info"]:
        labels[ids == segment["id"]] = segment["label_id"]
    return labels


def outputs_of(size: int, realistic: bool) -> ModelOutput:
    side = size // STRIDE
    return realistic_outputs(side, side) if realistic else noise_outputs(side, side)


def noise_outputs(height: int, width: int, seed: int = 0) -> ModelOutput:
    generator = torch.Generator().manual_seed(seed)
    return ModelOutput(
        class_queries_logits=3 * torch.randn(IMAGES, QUERIES, NUM_LABELS + 1, generator=generator),
        masks_queries_logits=3 * torch.randn(IMAGES, QUERIES, height, width, generator=generator),
    )


def realistic_outputs(height: int, width: int, seed: int = 0) -> ModelOutput:
    """Class logits (4, 100, 134) and mask logits (4, 100, height, width); see the head of the file."""
    generator = torch.Generator().manual_seed(seed)
    images = [realistic_image(height, width, generator) for _ in range(IMAGES)]
    classes, masks = (torch.stack(parts) for parts in zip(*images, strict=True))
    return ModelOutput(class_queries_logits=classes, masks_queries_logits=masks)


def realistic_image(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    area_fields = smooth_fields(STUFF, height, width, generator)
    highest = area_fields.topk(2, dim=0).values
    margins = area_fields - torch.where(area_fields == highest[0], highest[1], highest[0])  # > 0 inside
    slope = (margins.diff(dim=1).abs().mean() + margins.diff(dim=2).abs().mean()) / 2  # of the field, for one cell
    distances = list(margins / slope)
    for _ in range(THINGS):
        thing = ellipse(height, width, generator)
        distances = [torch.minimum(other, -thing) for other in distances] + [thing]
    segments = len(distances)
    for _ in range(SECOND_QUERIES):
        which = STUFF + int(torch.randint(THINGS, (), generator=generator))
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        distances.append(distances[which].roll(shift, dims=(0, 1)) - 1)
    found = len(distances)
    masks = torch.full((QUERIES, height, width), -MASK_LOGIT)
    masks[:found] = MASK_LOGIT * torch.tanh(torch.stack(distances) / 2)
    masks += smooth_fields(QUERIES, height, width, generator)
    classes = torch.randn(QUERIES, NUM_LABELS + 1, generator=generator)
    labels = torch.randint(NUM_LABELS, (QUERIES,), generator=generator)
    queries = torch.arange(QUERIES)
    classes[queries[:segments], labels[:segments]] += 10
    classes[queries[segments:found], labels[segments:found]] += 6
    classes[segments:, -1] += 7
    classes[found:, -1] += 4
    order = torch.randperm(QUERIES, generator=generator)
    return classes[order], masks[order]


def smooth_fields(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, height, width) fields of mean 0 and variance about 1, with some five hills across."""
    coarse = torch.randn(1, count, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]


def ellipse(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Signed distance, in cells and positive inside, to an ellipse's outline: (height, width), about right near it."""
    place, radii, turn = (torch.rand(count, generator=generator).tolist() for count in (2, 2, 1))
    rows = (torch.arange(height) - place[0] * height)[:, None]
    columns = (torch.arange(width) - place[1] * width)[None]
    angle = math.pi * turn[0]
    along = (rows * math.cos(angle) + columns * math.sin(angle)) / (0.02 + 0.13 * radii[0])
    across = (columns * math.cos(angle) - rows * math.sin(angle)) / (0.02 + 0.13 * radii[1])
    side = min(height, width)
    shortest = side * (0.02 + 0.13 * min(radii))
    return (1 - (along.square() + across.square()).sqrt() / side) * shortest
