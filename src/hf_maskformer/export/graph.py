"""What is exported of a model: tensors in, tensors out; a free batch size and, where possible, a free image size."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hf_maskformer.model.postprocess import class_probabilities

INPUTS = ("pixel_values", "pixel_mask")
LOGITS = ("class_queries_logits", "masks_queries_logits")
SEMANTIC_MAP = ("semantic_map",)
STRIDE = 32  # free heights and widths are multiples of it, as those that the image processor pads to
MOST_IMAGES, MOST_CELLS = 256, 256  # of a batch; of an axis, in strides


class LogitsGraph(nn.Module):
    """`pixel_values` (B, C, H, W), `pixel_mask` (B, H, W) -> class logits (B, Q, K + 1), mask logits (B, Q, h, w)."""

    outputs: tuple[str, ...] = LOGITS

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return output.class_queries_logits, output.masks_queries_logits


class SemanticGraph(LogitsGraph):
    """The same inputs -> the label of each pixel, (B, H, W) int64 at the size of the canvas, padding included."""

    outputs = SEMANTIC_MAP

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        class_logits, mask_logits = super().forward(pixel_values, pixel_mask)
        probabilities = class_probabilities(class_logits, self.model.config.class_activation)
        scores = torch.einsum("bqk,bqhw->bkhw", probabilities, mask_logits.sigmoid())  # (B, K, h, w)
        size = pixel_values.shape[-2:]
        return (F.interpolate(scores, size=size, mode="bilinear", align_corners=False).argmax(dim=1),)


def may_have_free_size(config: Any) -> bool:
    """Whether no part is known to work with the size as numbers: the windows of Swin (torch needs minutes to find that
    out), the points of deformable attention, and the places of anchored queries."""
    by_numbers = config.pixel_decoder.startswith("deformable") or config.query_decoder == "anchored"
    return config.backbone_config.model_type != "swin" and not by_numbers


def trace(graph: LogitsGraph, inputs: dict[str, Tensor], *, free_size: bool) -> ExportedProgram:
    """The program of a graph.

    Args:
        graph: in eval mode.
        inputs: an example of two images at least; a batch of one would be taken for a constant.
        free_size: for images of any size, or for the size of `inputs` alone. The number of images is free.

    Raises:
        RuntimeError, ValueError, AssertionError: of torch, where code of the model depends on a free size.
    """
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    axes: dict[str, dict[int, Any]] = {name: {0: batch} for name in INPUTS}
    if free_size:
        rows, columns = STRIDE * Dim("rows", min=1, max=MOST_CELLS), STRIDE * Dim("columns", min=1, max=MOST_CELLS)
        axes["pixel_values"] |= {2: rows, 3: columns}
        axes["pixel_mask"] |= {1: rows, 2: columns}
    with torch.no_grad(), _plain_attention(graph.model.model.backbone.body):
        return torch.export.export(graph, (), kwargs=inputs, dynamic_shapes=axes)


@contextmanager
def _plain_attention(body: Any) -> Iterator[None]:
    """Swin's fused attention cannot be decomposed for ONNX: its output has strides that a decomposition lacks."""
    before = body.config._attn_implementation
    if body.config.model_type == "swin":
        body.set_attn_implementation("eager")
    try:
        yield
    finally:
        if body.config._attn_implementation != before:
            body.set_attn_implementation(before)
