"""Images that exported files are tried with: of the user's data set, or built-in scenes."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_maskformer.data.scenes import load_scenes
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.export.graph import INPUTS, STRIDE

logger = logging.getLogger(__name__)

SCENE_SIZES = ((96, 128), (128, 80))  # of different shapes, so that padding takes part


def example_inputs(processor: Any, data: SegmentationData | None, count: int = 2) -> dict[str, Tensor]:
    """`count` images as the processor makes them: `pixel_values` and `pixel_mask`, which differ in their padding."""
    if data is not None:
        images = [data.image(index % len(data)) for index in range(count)]
    else:
        scenes = [load_scenes("val", length=count, image_size=size) for size in SCENE_SIZES]
        images = [scenes[index % len(scenes)].image(index) for index in range(count)]
    inputs = processor(images=images, return_tensors="pt")
    return {name: inputs[name] for name in INPUTS}


def on_one_canvas(processor: Any) -> Any:
    """A processor whose images all have one size, for files that take no other: one that resizes by the shorter side
    is replaced, with a warning, by one that fits images into the largest size that a wide one would have."""
    size = dict(processor.size)
    if "shortest_edge" not in size:
        return processor
    height, width = size["shortest_edge"], size["longest_edge"]
    logger.warning(
        "the file takes images of one size only: they are fitted into %dx%d pixels (height x width), "
        "the model resizes them by their shorter side",
        height,
        width,
    )
    canvas = {"max_height": height, "max_width": width}
    return type(processor).from_dict({**processor.to_dict(), "size": canvas})


def resized(inputs: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The inputs at another size, each side a multiple of the stride."""
    sides = [max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in inputs["pixel_values"].shape[-2:]]
    mask = inputs["pixel_mask"][:, None].float()
    return {
        "pixel_values": F.interpolate(inputs["pixel_values"], size=sides, mode="bilinear", align_corners=False),
        "pixel_mask": F.interpolate(mask, size=sides, mode="nearest")[:, 0].to(torch.int64),
    }
