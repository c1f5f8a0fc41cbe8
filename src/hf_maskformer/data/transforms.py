"""Resize, crop and colour as transforms of torchvision.transforms.v2, to be mixed with v2's own.

A sample travels through them as `{"image": tv_tensors.Image (3, H, W) uint8, "layers": tv_tensors.Mask (L, H, W),
"class_labels": ClassLabels (N,)}`: the layers of `SegmentMasks` hold ids, and ids survive every geometric transform,
because v2 moves masks to the nearest pixel. v2's transforms draw from torch's generator; so do these, and
`apply_transforms` seeds it for each sample.

Resize and crop are windows (`data/windows.py`): `TrainAugmentation` chains them and resamples once.
Scale jitter is that of Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method" (CVPR 2021), the
choice of resizes and crops that of Carion et al., "End-to-End Object Detection with Transformers" (ECCV 2020). The
colour distortion is that of SSD (Liu et al., ECCV 2016), here as one linear map of RGB.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import get_size

from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segment_masks import SegmentMasks, id_type
from hf_maskformer.data.windows import Window, resample_image, resample_masks

CROP_ATTEMPTS = 10  # MaskFormer, sec. 4.1 and its released crop code
BRIGHTNESS = 32.0  # of 255, either way; this and the next three are SSD's
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DEGREES = 18.0
JITTER_PROBABILITY = 0.5  # for each of the four
LUMA = np.array([0.299, 0.587, 0.114])
# RGB to luma and two colour axes (YIQ): turning the plane of the latter two changes the hue.
RGB_TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)

# What a crop would hold: pixels of each class, by a window that may still be refused.
ClassAreas = Callable[[Window], np.ndarray]


class ClassLabels(tv_tensors.TVTensor):
    """(N,) class of each id of the layers: id k + 1 is of class `labels[k]`. v2's transforms pass it on."""


class WindowTransform(v2.Transform):
    """A resize or a crop: what is seen of the image, drawn at random."""

    _transformed_types = (tv_tensors.Image, tv_tensors.Mask, ClassLabels)

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        """What is seen after this transform, if `window` was seen before it."""
        raise TypeError(f"{type(self).__name__} must define next_window")

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        for value in flat_inputs:
            if isinstance(value, tv_tensors.TVTensor) and not isinstance(value, self._transformed_types):
                raise ValueError(f"{type(self).__name__} moves images and masks, got {type(value).__name__}")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        pictures = [value for value in flat_inputs if not isinstance(value, ClassLabels)]
        height, width = get_size(pictures[0])
        window = Window.whole((height, width))
        return {"window": self.next_window(window, generator_from_torch(), _class_areas_of(flat_inputs))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        window: Window = params["window"]
        if isinstance(inpt, ClassLabels) or window == Window.whole(inpt.shape[-2:]):
            return inpt
        if isinstance(inpt, tv_tensors.Image):
            return to_tv_image(resample_image(to_array(inpt), window))
        rows, columns = window.source_rows(inpt.shape[-2]), window.source_columns(inpt.shape[-1])
        return tv_tensors.wrap(inpt[..., torch.from_numpy(rows)[:, None], torch.from_numpy(columns)], like=inpt)


class LargeScaleJitter(WindowTransform):
    """Resize to a random multiple, within `scale_range`, of the size that just fits inside `target_size` (H, W)."""

    def __init__(self, target_size: tuple[int, int], scale_range: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        low, high = scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range must be (low, high) with 0 < low <= high, got {scale_range}")
        self.target_size = check_size(target_size, "target_size")
        self.scale_range = scale_range

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        height, width = window.size
        fit = min(self.target_size[0] / height, self.target_size[1] / width)
        scale = fit * rng.uniform(*self.scale_range)
        return window.resized((max(1, round(height * scale)), max(1, round(width * scale))))


class ResizeShortestEdge(WindowTransform):
    """Resize so that the shorter side is one of `sizes`, drawn at random, and the longer one at most `max_size`."""

    def __init__(self, sizes: tuple[int, ...], max_size: int | None = None) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be at least one number of pixels, got {sizes}")
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be at least 1 or None, got {max_size}")
        self.sizes = tuple(sizes)
        self.max_size = max_size

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        height, width = window.size
        scale = self.sizes[int(rng.integers(len(self.sizes)))] / min(height, width)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(height, width))
        return window.resized((max(1, round(height * scale)), max(1, round(width * scale))))


class RandomCrop(WindowTransform):
    """Crop to `size` (H, W), or to what there is of a smaller image; nothing is padded.

    With `max_class_fraction` a crop in which one class takes more than this part of the labelled pixels is drawn
    again, up to `CROP_ATTEMPTS` times: the crop rule of DeepLab and MaskFormer. Classes are those of `class_labels`;
    without them, and in a mask of shape (H, W), each value but 0 is a class.
    """

    def __init__(self, size: tuple[int, int], max_class_fraction: float | None = None) -> None:
        super().__init__()
        if max_class_fraction is not None and not 0 < max_class_fraction <= 1:
            raise ValueError(f"max_class_fraction must be in 0..1 and not 0, or None, got {max_class_fraction}")
        self.size = check_size(size, "size")
        self.max_class_fraction = max_class_fraction

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        for _ in range(CROP_ATTEMPTS):
            crop = random_crop(window, self.size, rng)
            if self.max_class_fraction is None or class_areas is None:
                break
            areas = class_areas(crop)
            if areas.size and 0 < areas.max() <= self.max_class_fraction * areas.sum():
                break
        return crop


class RandomCropRange(WindowTransform):
    """Crop to a height and a width drawn from `smallest`..`largest`, both included, each cut to the image's side."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        if not 0 < smallest <= largest:
            raise ValueError(f"smallest and largest must be 0 < smallest <= largest, got {smallest} and {largest}")
        self.smallest = smallest
        self.largest = largest

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        limits = [(min(side, self.smallest), min(side, self.largest)) for side in window.size]
        height, width = (int(rng.integers(low, high + 1)) for low, high in limits)
        return random_crop(window, (height, width), rng)


class WindowChain(WindowTransform):
    """Several windows, one after the other and resampled once; with probability `skip` the chain does nothing.

    `WindowChain([WindowChain([a, b], skip=0.5), c])` is half the time c alone, half the time a, b and c.
    """

    def __init__(self, steps: Sequence[WindowTransform], skip: float = 0.0) -> None:
        super().__init__()
        if not 0 <= skip <= 1:
            raise ValueError(f"skip must be in 0..1, got {skip}")
        self.steps = tuple(steps)
        self.skip = skip

    def next_window(self, window: Window, rng: np.random.Generator, class_areas: ClassAreas | None) -> Window:
        if self.skip > 0 and rng.random() < self.skip:
            return window
        for step in self.steps:
            window = step.next_window(window, rng, class_areas)
        return window


class PhotometricDistortion(v2.Transform):
    """Random brightness, contrast, saturation and hue of a uint8 image; masks stay as they are.

    The linear form of v2.RandomPhotometricDistort, several times as fast; channels are not permuted.
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"matrix": random_colour_matrix(generator_from_torch())}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return to_tv_image(map_colours(to_array(inpt), params["matrix"]))


def random_colour_matrix(rng: np.random.Generator) -> np.ndarray:
    """(3, 4): random brightness, contrast, saturation and hue, each with probability one half."""
    chosen = rng.random(4) < JITTER_PROBABILITY
    brightness, contrast, saturation, hue = (
        rng.uniform(-BRIGHTNESS, BRIGHTNESS),
        rng.uniform(*CONTRAST_RANGE),
        rng.uniform(*SATURATION_RANGE),
        np.deg2rad(rng.uniform(-HUE_DEGREES, HUE_DEGREES)),
    )
    matrix = np.eye(3)
    if chosen[3]:
        cos, sin = np.cos(hue), np.sin(hue)
        matrix = YIQ_TO_RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ RGB_TO_YIQ
    if chosen[2]:
        matrix = (saturation * np.eye(3) + (1 - saturation) * LUMA[None, :]) @ matrix
    if chosen[1]:
        matrix = contrast * matrix
    offset = brightness if chosen[0] else 0.0
    return np.concatenate([matrix, np.full((3, 1), offset)], axis=1)


def map_colours(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 after a (3, 4) linear map in one pass; values are clipped once, at the end."""
    mapped = PILImage.fromarray(image).convert("RGB", tuple(matrix.reshape(-1).tolist()))
    return np.asarray(mapped)


def random_crop(window: Window, size: tuple[int, int], rng: np.random.Generator) -> Window:
    """A crop of `size`, cut to the window's own, anywhere inside it."""
    height, width = min(window.height, size[0]), min(window.width, size[1])
    top = int(rng.integers(0, window.height - height + 1))
    left = int(rng.integers(0, window.width - width + 1))
    return window.cropped(top, left, (height, width))


def check_size(size: tuple[int, int], name: str) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} must be (height, width), both at least 1, got {size}")
    return int(size[0]), int(size[1])


def generator_from_torch() -> np.random.Generator:
    """A numpy generator that depends on the state of torch's and moves it on."""
    return np.random.default_rng(int(torch.randint(2**62, ())))


def apply_transforms(sample: Sample, transforms: Callable[[Any], Any], rng: np.random.Generator) -> Sample:
    """A sample after any v2 transforms; the same state of `rng` gives the same result.

    torch's generator is seeded from `rng` for the time of the call and then put back; devices are left alone. Masks
    that are left without a pixel are removed.

    Raises:
        ValueError: what comes back is not an image (3, H, W) uint8 with layers (L, H, W) of its size.
    """
    layers = np.ascontiguousarray(sample.segments.layers, dtype=np.int32)  # v2 has few kernels for uint16
    data = {
        "image": to_tv_image(sample.image),
        "layers": tv_tensors.Mask(torch.from_numpy(layers)),
        "class_labels": torch.from_numpy(sample.class_labels.copy()).as_subclass(ClassLabels),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        result = transforms(data)
    image, layers = result["image"], result["layers"]
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or layers.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"{sample.file_name}: transforms must return an image (3, H, W) uint8 and layers (L, H, W), got "
            f"{tuple(image.shape)} {image.dtype} and {tuple(layers.shape)}"
        )
    count = len(sample.segments)
    return sample.with_masks(to_array(image), SegmentMasks(layers.numpy().astype(id_type(count)), count))


def to_tv_image(image: np.ndarray) -> tv_tensors.Image:
    """(H, W, 3) uint8 -> (3, H, W), without a copy where the array may be written to."""
    return tv_tensors.Image(torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1))


def to_array(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) -> (H, W, 3) in row order."""
    return np.ascontiguousarray(image.as_subclass(torch.Tensor).permute(1, 2, 0).numpy())


def _class_areas_of(flat_inputs: list[Any]) -> ClassAreas | None:
    """Pixels of each class in a window over the first mask of a sample, or None if it has no mask."""
    mask = next((value for value in flat_inputs if isinstance(value, tv_tensors.Mask)), None)
    if mask is None:
        return None
    array = mask.as_subclass(torch.Tensor).reshape(-1, *mask.shape[-2:]).numpy()  # (L, H, W)
    labels = next((value for value in flat_inputs if isinstance(value, ClassLabels)), None)
    count = int(array.max(initial=0)) if labels is None else len(labels)
    segments = SegmentMasks(array, count)
    classes = np.arange(count) if labels is None else labels.as_subclass(torch.Tensor).numpy()
    return lambda window: class_areas(segments, classes, window)


def class_areas(masks: SegmentMasks, class_labels: np.ndarray, window: Window) -> np.ndarray:
    """(K,) pixels of each class in a window."""
    return np.bincount(class_labels, weights=resample_masks(masks, window).areas())
