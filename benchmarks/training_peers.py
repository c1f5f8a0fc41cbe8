"""What users would train instead of ours, as plain users of those libraries would: models of transformers.

A peer takes the batches that ours is trained on and predicts one image at its original size; `benchmarks/unet_peer.py`
holds the one that is not from transformers. All have random weights, their library's default decoder and loss, and the
backbone of ours where they take one.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle

NATIVE, CANVAS = "native", "canvas"  # how large the network sees an image: as it is, or resized as for ours
# AP ranks all detections; a score threshold would only cut off the tail of its curve.
AP_SCORE_THRESHOLD = 0.0
SIZE_DIVISOR = 32  # the coarsest stride of the backbones


@dataclass(frozen=True)
class Pixels:
    """How an image becomes the network's input, as for ours: 0..255 to 0..1, then mean and standard deviation.

    It is resized to fit inside the `canvas`, or by its shorter side to the canvas's, where the longer one allows it.
    """

    canvas: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    by_shortest_edge: bool = False

    def scale(self, size: tuple[int, int], view: str) -> float:
        """By which an image of `size` (H, W) is resized for a view."""
        if view == NATIVE:
            return 1.0
        if self.by_shortest_edge:
            return min(min(self.canvas) / min(size), max(self.canvas) / max(size))
        return min(self.canvas[0] / size[0], self.canvas[1] / size[1])

    def network_image(self, image: np.ndarray, view: str) -> torch.Tensor:
        """(1, 3, h, w) of a (H, W, 3) uint8 image, with its aspect and without padding."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255.0  # (1, 3, H, W)
        scale = self.scale(image.shape[:2], view)
        if scale != 1.0:
            size = [max(1, round(side * scale)) for side in image.shape[:2]]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class Peer(Protocol):
    """A model to train and to measure.

    `views` are the sizes at which it can be evaluated; `loss` takes a batch of our collator, on the model's device;
    `predict` takes a (H, W, 3) uint8 image and gives what the metric of the task is given: a (H, W) label map, or
    masks, scores and labels.
    """

    model: nn.Module
    views: tuple[str, ...]

    def loss(self, batch: dict[str, Any]) -> torch.Tensor: ...

    def predict(self, image: np.ndarray, view: str) -> Any: ...


def label_map(masks: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """(H, W) int64 of (N, H, W) masks of classes; `ignore_index` where no mask is, so also in the padding."""
    painted = torch.full(masks.shape[-2:], ignore_index, dtype=torch.int64, device=masks.device)
    for mask, label in zip(masks.bool(), labels, strict=True):
        painted[mask] = label
    return painted


class SegFormer:
    """SegFormer-B0 (Xie et al., NeurIPS 2021): classes per pixel, with transformers' default configuration."""

    views = (CANVAS, NATIVE)

    def __init__(self, ours: HfMaskFormerConfig, spec: LabelSpec, pixels: Pixels) -> None:
        self.ignore_index, self.pixels = spec.ignore_index, pixels
        config = SegformerConfig(id2label=spec.id2label, semantic_loss_ignore_index=spec.ignore_index)
        self.model = SegformerForSemanticSegmentation(config)
        self.processor = SegformerImageProcessor()

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        pairs = zip(batch["mask_labels"], batch["class_labels"], strict=True)
        labels = torch.stack([label_map(masks, classes, self.ignore_index) for masks, classes in pairs])  # (B, H, W)
        return self.model(pixel_values=batch["pixel_values"], labels=labels).loss

    def predict(self, image: np.ndarray, view: str) -> np.ndarray:
        outputs = self.model(pixel_values=self.pixels.network_image(image, view).to(self.model.device))
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        return maps[0].cpu().numpy()


def mask_loss(model: nn.Module, batch: dict[str, Any], **further: Any) -> torch.Tensor:
    """The loss that transformers' mask classification models compute themselves."""
    names = ("pixel_values", "pixel_mask", "class_labels")
    masks = [masks.float() for masks in batch["mask_labels"]]
    return model(**{name: batch[name] for name in names}, mask_labels=masks, **further).loss.sum()


class MaskFormer:
    """transformers' MaskFormer (Cheng et al., NeurIPS 2021) with the backbone of ours.

    An image is stretched to the canvas, so that no padding reaches transformers' post-processing.
    """

    views = (CANVAS,)

    def __init__(self, ours: HfMaskFormerConfig, spec: LabelSpec, pixels: Pixels) -> None:
        # As published: every decoder layer is supervised, which the library leaves out unless asked. With it a call
        # that does not ask for the hidden states is a TypeError (transformers 5.17 to 5.23).
        config = MaskFormerConfig(
            backbone_config=ours.backbone_config, id2label=spec.id2label, use_auxiliary_loss=True
        )
        self.model = MaskFormerForInstanceSegmentation(config)
        height, width = pixels.canvas
        self.processor = MaskFormerImageProcessor(
            size={"height": height, "width": width},
            ignore_index=spec.ignore_index,
            image_mean=pixels.mean,
            image_std=pixels.std,
        )

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return mask_loss(self.model, batch, output_hidden_states=True)

    def predict(self, image: np.ndarray, view: str) -> np.ndarray:
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        outputs = self.model(
            pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"], output_hidden_states=True
        )
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        return maps[0].cpu().numpy()


class Mask2Former:
    """transformers' Mask2Former (Cheng et al., CVPR 2022) with the backbone of ours.

    Its processor fits an image inside the canvas, each side rounded up to the coarsest stride instead of padded.
    """

    views = (CANVAS,)

    def __init__(self, ours: HfMaskFormerConfig, spec: LabelSpec, pixels: Pixels) -> None:
        self.things = set(spec.thing_label_ids)
        config = Mask2FormerConfig(backbone_config=ours.backbone_config, id2label=spec.id2label)
        self.model = Mask2FormerForUniversalSegmentation(config)
        self.processor = Mask2FormerImageProcessor(
            size={"shortest_edge": min(pixels.canvas), "longest_edge": max(pixels.canvas)},
            size_divisor=SIZE_DIVISOR,
            ignore_index=spec.ignore_index,
            image_mean=pixels.mean,
            image_std=pixels.std,
        )

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return mask_loss(self.model, batch)

    def predict(self, image: np.ndarray, view: str) -> dict[str, Any]:
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        outputs = self.model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        result = self.processor.post_process_instance_segmentation(
            outputs, threshold=AP_SCORE_THRESHOLD, target_sizes=[image.shape[:2]], return_binary_maps=True
        )[0]
        # Without any instance `segmentation` is a map of -1, and there are no segments to pair it with.
        instances = list(zip(result["segments_info"], result["segmentation"], strict=False))
        instances = [(info, mask) for info, mask in instances if info["label_id"] in self.things]
        return {
            "masks": [encode_rle(mask.bool().cpu().numpy()) for _, mask in instances],
            "scores": np.array([info["score"] for info, _ in instances], dtype=np.float64),
            "labels": np.array([info["label_id"] for info, _ in instances], dtype=np.int64),
        }


def unet(ours: HfMaskFormerConfig, spec: LabelSpec, pixels: Pixels) -> Peer:
    """`unet_peer.ThreeClassUNet`; MONAI is imported only where it is wanted."""
    from unet_peer import ThreeClassUNet

    return ThreeClassUNet(ours, spec, pixels)


MakePeer = Callable[[HfMaskFormerConfig, LabelSpec, Pixels], Peer]
# Task -> name of a row -> how to make it.
PEERS: dict[str, dict[str, MakePeer]] = {
    "semantic": {"segformer": SegFormer, "maskformer": MaskFormer},
    "instance": {"mask2former": Mask2Former, "unet": unet},
}
TAKES_OUR_BACKBONE = {"maskformer", "mask2former"}
PACKAGES = {"unet": ("monai",)}  # beside what hf_maskformer itself needs


def check_packages(models: Sequence[str]) -> None:
    """ValueError if a package that one of the models needs is not installed."""
    for model in models:
        for package in PACKAGES.get(model, ()):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"model {model!r} needs the package {package}, which is not installed: "
                    "pip install hf_maskformer[benchmarks]"
                )
