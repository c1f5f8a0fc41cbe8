"""What a microscopist would train instead: a U-Net with three classes, and connected components.

Ronneberger et al., "U-Net" (MICCAI 2015), as MONAI's 2D UNet with residual units. Classes are background, interior
and border of an object, a way that was common in the 2018 Data Science Bowl (Caicedo et al., Nature Methods 2019):
objects that touch are parted by their borders, and grow back by the border's width once the components are told apart.
"""

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from training_peers import CANVAS, NATIVE, Pixels

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle

BACKGROUND, INTERIOR, BORDER = 0, 1, 2
IGNORED = -100  # of the padding: the default of torch's cross entropy
BORDER_WIDTH = 1  # pixels, inside each object
BORDER_WEIGHT = 3.0  # of the rare border pixels in the cross entropy
MIN_PIXELS = 10  # smaller objects are dropped; the smallest nucleus of the 2018 bowl has 21
CHANNELS = (32, 64, 128, 256, 512)
STRIDES = (2, 2, 2, 2)
SIZE_DIVISOR = 16  # the product of the strides
MAX_OBJECTS = 100  # of an image; average precision counts no more


def three_class_target(masks: torch.Tensor, valid: torch.Tensor, width: int = BORDER_WIDTH) -> torch.Tensor:
    """(H, W) int64 classes of (N, H, W) object masks; of masks that overlap the last is on top.

    A pixel of an object is border if the square of `width` pixels around it holds another object or background. The
    edge of the crop and the padding, where `valid` (H, W) is 0, are neither; padding is `IGNORED`.
    """
    numbers = torch.arange(1, len(masks) + 1, dtype=torch.float32, device=masks.device)
    nothing = torch.zeros((1, *valid.shape), device=masks.device)
    objects = torch.cat([nothing, masks.float() * numbers[:, None, None]]).amax(dim=0)  # (H, W)
    padding = ~valid.bool()
    # Max-pooling pads with -inf, which is never the maximum: what lies outside is no neighbour.
    highest = _highest_near(objects.masked_fill(padding, -torch.inf), width)
    lowest = -_highest_near((-objects).masked_fill(padding, -torch.inf), width)
    target = torch.full(objects.shape, BACKGROUND, dtype=torch.int64, device=masks.device)
    target[objects > 0] = INTERIOR
    target[(objects > 0) & ((highest != objects) | (lowest != objects))] = BORDER
    return target.masked_fill(padding, IGNORED)


def _highest_near(values: torch.Tensor, width: int) -> torch.Tensor:
    return F.max_pool2d(values[None, None], 2 * width + 1, stride=1, padding=width)[0, 0]  # (H, W)


def decode_objects(
    probabilities: np.ndarray, width: int = BORDER_WIDTH, min_pixels: int = MIN_PIXELS, limit: int = MAX_OBJECTS
) -> tuple[np.ndarray, np.ndarray]:
    """Objects of (3, H, W) class probabilities: ((H, W) map with object k as k + 1, (N,) scores), best first.

    The components (4 neighbours) of the pixels whose class is interior grow by `width` pixels of the square kind into
    the pixels that are not background; of the `limit` best that have `min_pixels`, the score is the mean probability
    of interior over the component before it grew.
    """
    classes = probabilities.argmax(axis=0)
    components, count = ndimage.label(classes == INTERIOR)
    if count == 0:
        return np.zeros(classes.shape, dtype=np.int32), np.zeros(0)
    scores = ndimage.mean(probabilities[INTERIOR], components, index=np.arange(1, count + 1))  # (count,)
    distance, nearest = ndimage.distance_transform_cdt(components == 0, metric="chessboard", return_indices=True)
    grown = np.where((classes != BACKGROUND) & (distance <= width), components[tuple(nearest)], 0)
    areas = np.bincount(grown.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-scores, kind="stable")
    kept = order[areas[order] >= min_pixels][:limit]
    numbers = np.zeros(count + 1, dtype=np.int32)
    numbers[kept + 1] = np.arange(1, len(kept) + 1)
    return numbers[grown], scores[kept]


def monai_unet() -> nn.Module:
    """MONAI's 2D UNet with batch norm and two residual units a level; 3 channels in, 3 classes out."""
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        channels=CHANNELS,
        strides=STRIDES,
        num_res_units=2,
        norm="batch",
    )


class ThreeClassUNet:
    """The U-Net as a row of the comparison.

    Args:
        network: (B, 3, H, W) -> (B, 3, H, W) logits for sides that are multiples of 16; None: MONAI's.

    Raises:
        ValueError: the data has not exactly one class of things.
    """

    views = (CANVAS, NATIVE)

    def __init__(
        self, ours: HfMaskFormerConfig, spec: LabelSpec, pixels: Pixels, network: nn.Module | None = None
    ) -> None:
        if len(spec.thing_label_ids) != 1:
            names = [spec.id2label[label] for label in spec.thing_label_ids]
            raise ValueError(f"model 'unet' tells objects of one class apart; the data has the things {names}")
        self.label = spec.thing_label_ids[0]
        self.pixels = pixels
        self.model = monai_unet() if network is None else network

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        pairs = zip(batch["mask_labels"], batch["pixel_mask"], strict=True)
        target = torch.stack([three_class_target(masks, valid) for masks, valid in pairs])  # (B, H, W)
        weight = torch.tensor([1.0, 1.0, BORDER_WEIGHT], device=target.device)
        return F.cross_entropy(self.logits(batch["pixel_values"]), target, weight=weight, ignore_index=IGNORED)

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W); the sides are padded to multiples of 16 and cut again."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        return self.model(padded)[..., :height, :width]

    def predict(self, image: np.ndarray, view: str) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        probabilities = self.logits(self.pixels.network_image(image, view).to(device)).float().softmax(dim=1)
        if probabilities.shape[-2:] != image.shape[:2]:
            probabilities = F.interpolate(probabilities, size=image.shape[:2], mode="bilinear", align_corners=False)
        # A border of one pixel of the network's image is wider where that image was made smaller.
        width = max(1, round(BORDER_WIDTH / self.pixels.scale(image.shape[:2], view)))
        objects, scores = decode_objects(probabilities[0].cpu().numpy(), width)
        return {
            "masks": [encode_rle(objects == number) for number in range(1, len(scores) + 1)],
            "scores": scores,
            "labels": np.full(len(scores), self.label, dtype=np.int64),
        }
