"""What `speed.py` measures of the network: the same work by ours and by transformers, from the same weights.

Every case holds two calls without arguments and a check that they give the same numbers. A call does all of its work
anew and returns nothing that the next one needs.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
    SwinConfig,
)
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from hf_maskformer.model.deformable_attention import cell_centres, read_gathered, read_sampled
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.point_sampling import PointSource
from hf_maskformer.model.query_decoder_standard import LayerPrediction

SWIN_TINY = {
    "model_type": "swin",
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
NUM_LABELS = 133
LEVEL_STRIDES = (32, 16, 8)
PEER = "transformers"
TITLES = {"maskformer": "MaskFormer", "mask2former": "Mask2Former"}
HEADS, POINTS, HEAD_CHANNELS = 8, 4, 32


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        title: what is done, as the pages have it.
        calls: what is timed, by the name of the side; `transformers` is what the others are measured by.
        difference: the largest difference between the sides' results; computed anew by every call.
        allowed: the most that `difference` may give.
        aim: how many times as fast ours has to be, if anything was set.
        inputs: what a call starts from, weights too, where the peak of its own tensors is measured.
        peak_aim: the part of transformers' peak that ours may take, if anything was set.
    """

    title: str
    calls: dict[str, Callable[[], Any]]
    difference: Callable[[], float]
    allowed: float
    aim: float | None = None
    inputs: tuple[Tensor, ...] = ()
    peak_aim: float | None = None


def model_pair(
    family: str = "mask2former", *, auxiliary: bool = False
) -> tuple[HfMaskFormerForUniversalSegmentation, PreTrainedModel]:
    """Ours and theirs, full-size Swin-T without dropout, the same random weights; deformable attention is away from
    its start, where all weights are equal and all offsets regular.

    `auxiliary`: MaskFormer with losses of all layers, as published; transformers has them off, and its inference fails
    where they are on.
    """
    torch.manual_seed(0)
    labels = {index: f"class {index}" for index in range(NUM_LABELS)}
    if family == "mask2former":
        theirs = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=SWIN_TINY, id2label=labels))
    else:
        decoder = DetrConfig(dropout=0.0)
        config = MaskFormerConfig(
            backbone_config=SwinConfig(**SWIN_TINY),
            decoder_config=decoder,
            id2label=labels,
            use_auxiliary_loss=auxiliary,
        )
        theirs = MaskFormerForInstanceSegmentation(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = HfMaskFormerForUniversalSegmentation.from_pretrained(folder)
    return ours.eval(), theirs.eval()


def random_images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def forward_case(family: str, size: int, *, aim: float) -> Case:
    """Images to class and mask logits of the last layer: one image, no padding, float32.

    The results are compared in float64: a cell whose logit is 0 but for rounding is hidden from a query on one side
    and seen on the other, and from there on float32 results part by far more than rounding.
    """
    ours, theirs = model_pair(family)
    images = random_images(1, size)

    def outputs(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            output = model(pixel_values=images.to(dtype))
        return output.class_queries_logits, output.masks_queries_logits

    def difference() -> float:
        expected = outputs(theirs.double(), torch.float64)
        actual = outputs(ours.double(), torch.float64)
        ours.float(), theirs.float()  # exactly the weights that there were
        return largest_difference(actual, expected)

    calls = {"ours": lambda: outputs(ours), PEER: lambda: outputs(theirs)}
    title = f"{TITLES[family]} Swin-T, one image {size}x{size}, forward"
    return Case(title, calls, difference, allowed=1e-5, aim=aim)


def bf16_case(family: str, size: int, *, aim: float) -> Case | None:
    """`forward_case` with ours in bf16 (`optimize_for_inference`), transformers in float32; None where the CPU has no
    arithmetic for it. `difference` is that of the logits, of random weights; trained ones: `bf16_agreement.py`.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return None
    ours, theirs = model_pair(family)
    ours.optimize_for_inference(dtype=torch.bfloat16)
    images = random_images(1, size)

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            output = model(pixel_values=images.to(model.dtype))
        return output.class_queries_logits, output.masks_queries_logits

    def difference() -> float:
        expected = outputs(theirs)[0].float()
        return float((outputs(ours)[0].float() - expected).norm() / expected.norm())

    calls = {"ours": lambda: outputs(ours), PEER: lambda: outputs(theirs)}
    title = f"{TITLES[family]} Swin-T, one image {size}x{size}, forward in bf16 (transformers in float32)"
    return Case(title, calls, difference, allowed=0.2, aim=aim)


def train_step_case(family: str, size: int, *, aim: float, images: int = 2, targets: int = 12) -> Case:
    """Pixels and targets to the loss of all layers and the gradients of all weights; no padding, float32.

    Each side gets masks as its own image processor makes them: ours bool, transformers' float32. The losses are
    compared in float64, for the same points; MaskFormer's without those of the earlier layers, which transformers
    predicts from states that the paper's norm before the heads has not seen.
    """
    ours, theirs = model_pair(family, auxiliary=True)
    dense = family == "maskformer"
    if dense:
        theirs.config.output_hidden_states = True  # without them transformers has no auxiliary loss
    for model in (ours, theirs):
        model.train()
    pixels = random_images(images, size)
    masks, classes = rectangles(images, targets, size, torch.Generator().manual_seed(2))
    float_masks = [image_masks.float() for image_masks in masks]

    def loss(model: Any, mask_labels: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return model(pixel_values=pixels.to(dtype), mask_labels=mask_labels, class_labels=classes).loss

    def step(model: Any, mask_labels: list[Tensor]) -> None:
        loss(model, mask_labels).backward()
        model.zero_grad()

    def difference() -> float:
        if dense:
            theirs.config.use_auxiliary_loss = ours.config.loss_auxiliary = False
        with same_points(torch.float64), torch.no_grad():
            expected = loss(theirs.double(), [image_masks.double() for image_masks in masks], torch.float64)
            actual = loss(ours.double(), masks, torch.float64)
        ours.float(), theirs.float()
        theirs.config.use_auxiliary_loss = ours.config.loss_auxiliary = True
        return largest_difference((actual,), (expected,))

    calls = {"ours": lambda: step(ours, masks), PEER: lambda: step(theirs, float_masks)}
    title = f"{TITLES[family]} Swin-T, {images} images {size}x{size} with {targets} targets each, training step"
    return Case(title, calls, difference, allowed=1e-4, aim=aim)


def loss_case(size: int, *, images: int = 2, targets: int = 12, peak_aim: float | None = None) -> Case:
    """Query states of ten layers and per-pixel embedding to the loss, and back to the gradients of both.

    Each side gets masks as its own image processor makes them: ours bool, transformers' float32. Points are random
    in the timed calls, and the same on both sides where the results are compared.
    """
    ours, theirs = model_pair()
    layers = theirs.config.decoder_layers
    generator = torch.Generator().manual_seed(2)
    shape = (layers, images, theirs.config.num_queries, theirs.config.hidden_dim)
    states = torch.randn(shape, generator=generator).requires_grad_()
    side = size // 4
    features = torch.randn((images, theirs.config.mask_feature_size, side, side), generator=generator).requires_grad_()
    masks, classes = rectangles(images, targets // images, size, generator)
    float_masks = [image_masks.float() for image_masks in masks]

    def ours_loss() -> Tensor:
        predictions = [LayerPrediction(ours.model.class_head(layer), None, layer, None) for layer in states]
        return ours._loss(predictions, features, None, masks, classes, None, None)[0]

    def theirs_loss() -> Tensor:
        embedder = theirs.model.transformer_module.decoder.mask_predictor.mask_embedder
        class_logits = [theirs.class_predictor(layer) for layer in states]
        mask_logits = [torch.einsum("bqc, bchw -> bqhw", embedder(layer), features) for layer in states]
        auxiliary = theirs.get_auxiliary_logits(class_logits, mask_logits)
        terms = theirs.get_loss_dict(mask_logits[-1], class_logits[-1], float_masks, classes, auxiliary)
        return theirs.get_loss(terms)

    def results(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        value = loss()
        gradients = torch.autograd.grad(value, [states, features])
        return (value.detach(), *gradients)

    def difference() -> float:
        with same_points():
            return largest_difference(results(ours_loss), results(theirs_loss))

    calls = {"ours": lambda: results(ours_loss), PEER: lambda: results(theirs_loss)}
    inputs = (states, features, *masks, *float_masks, *classes, *weights_of(ours), *weights_of(theirs))
    title = f"loss of ten layers, {images} images {size}x{size}, {targets} targets in all, forward and backward"
    return Case(title, calls, difference, allowed=1e-4, aim=3.0, inputs=inputs, peak_aim=peak_aim)


def attention_case(size: int, *, backward: bool) -> Case:
    """Deformable attention alone: every cell of three levels reads 4 points of each with 8 heads of 32 channels."""
    shapes = [(size // stride, size // stride) for stride in LEVEL_STRIDES]
    cells = sum(height * width for height, width in shapes)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn((1, cells, HEADS, HEAD_CHANNELS), generator=generator)
    grouped = (1, cells, HEADS, len(shapes), POINTS)
    offsets = torch.randn((*grouped, 2), generator=generator) * 0.05  # of the canvas
    places = cell_centres(shapes, device=values.device)[:, :, None, None, None] + offsets
    weights = torch.rand(grouped, generator=generator).flatten(3).softmax(-1).view(grouped)
    above = torch.randn((1, cells, HEADS * HEAD_CHANNELS), generator=generator)  # the gradient that comes in
    sources = [tensor.requires_grad_(backward) for tensor in (values, places, weights)]

    def results(read: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        if not backward:
            with torch.inference_mode():
                return (read(),)
        output = read()
        return (output.detach(), *torch.autograd.grad(output, sources, above))

    reads: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: read_gathered(values, shapes, places, weights),
        "ours, sampled": lambda: read_sampled(values, shapes, places, weights),
        PEER: lambda: multi_scale_deformable_attention(values, shapes, places, weights),
    }

    def difference() -> float:
        expected = results(reads[PEER])
        return max(largest_difference(results(read), expected) for read in reads.values())

    calls = {name: (lambda read=read: results(read)) for name, read in reads.items()}
    title = f"deformable attention, {size}x{size}, forward{' and backward' if backward else ''}"
    return Case(title, calls, difference, allowed=1e-4)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def rectangles(images: int, count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """`count` targets for each image: bool masks (count, size, size) and classes (count,)."""
    corners = torch.randint(0, size // 2, (images, count, 2), generator=generator)
    masks = torch.zeros((images, count, size, size), dtype=torch.bool)
    for image, target in torch.cartesian_prod(torch.arange(images), torch.arange(count)).tolist():
        top, left = corners[image, target].tolist()
        masks[image, target, top : top + size // 3, left : left + size // 4] = True
    return list(masks), list(torch.randint(0, NUM_LABELS, (images, count), generator=generator))


@contextmanager
def same_points(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the block both sides draw the points of one table, by their number, transformers' in `dtype`."""
    real = torch.rand

    def points(masks: int, count: int) -> Tensor:
        return real((count, 2), generator=torch.Generator().manual_seed(count)).repeat(masks, 1, 1)

    def rand(*size: Any, **further: Any) -> Tensor:
        of_points = len(size) == 3 and size[2] == 2
        return points(size[0], size[1]).to(dtype) if of_points else real(*size, **further)

    with (
        mock.patch.object(PointSource, "draw", lambda self, image, masks, count: points(masks, count)),
        mock.patch.object(torch, "rand", rand),
    ):
        yield


def largest_difference(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Of all entries of all tensors, each tensor measured by its largest entry."""
    return max(
        float((first - second).abs().max() / second.abs().max().clamp(min=1e-30))
        for first, second in zip(one, other, strict=True)
    )
