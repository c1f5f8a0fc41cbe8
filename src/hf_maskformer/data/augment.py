"""Random scale, crop, flip and colour for training.

Scale jitter is that of Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method" (CVPR 2021), as used by
Mask2Former: the size is drawn relative to the size at which the image just fits the crop. The colour distortion is
that of SSD (Liu et al., ECCV 2016), here as one linear map of RGB. `max_class_fraction` is the crop rule of DeepLab
and MaskFormer: a crop in which one class takes more than this part of the labelled pixels is drawn again.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segment_masks import SegmentMasks

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


@dataclass(frozen=True)
class Window:
    """The part of the scaled image that is kept: scaled size, and top, left, height, width in scaled pixels."""

    scaled: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainAugmentation:
    """Callable (sample, rng) -> sample that is at most `crop_size`; padding is the processor's work.

    Args:
        crop_size: (H, W) of the result; smaller where the scaled image is smaller.
        scale_range: limits of the scale; 1 = the whole image just fits inside `crop_size`.
        flip_probability: of a horizontal flip.
        color_jitter: whether brightness, contrast, saturation and hue change.
        max_class_fraction: largest part of the labelled pixels that one class may take, or None for any.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    color_jitter: bool = True
    max_class_fraction: float | None = None

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range must be (low, high) with 0 < low <= high, got {self.scale_range}")
        if len(self.crop_size) != 2 or min(self.crop_size) < 1:
            raise ValueError(f"crop_size must be (height, width), both at least 1, got {self.crop_size}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in 0..1, got {self.flip_probability}")
        if self.max_class_fraction is not None and not 0 < self.max_class_fraction <= 1:
            raise ValueError(f"max_class_fraction must be in 0..1 and not 0, or None, got {self.max_class_fraction}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The same state of `rng` gives the same result. Masks that are left without a pixel are removed."""
        height, width = sample.image.shape[:2]
        fit = min(self.crop_size[0] / height, self.crop_size[1] / width)
        scale = fit * rng.uniform(*self.scale_range)
        scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
        window, masks = self._choose_window(sample, scaled, rng)
        image = resample_image(sample.image, window)
        if rng.random() < self.flip_probability:
            image = image[:, ::-1]
            masks = masks.apply(lambda array: array[..., ::-1])
        if self.color_jitter:
            image = jitter_colours(image, rng)
        keep = masks.areas() > 0
        return Sample(
            image=np.ascontiguousarray(image),
            masks=masks if keep.all() else masks.select(keep),
            class_labels=sample.class_labels[keep],
            iscrowd=sample.iscrowd[keep],
            image_id=sample.image_id,
            file_name=sample.file_name,
        )

    def _choose_window(
        self, sample: Sample, scaled: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Window, SegmentMasks]:
        """Draws crops until the classes are mixed enough; the last of `CROP_ATTEMPTS` is taken as it is."""
        for _ in range(CROP_ATTEMPTS):
            window = _random_window(scaled, self.crop_size, rng)
            masks = resample_masks(sample.segments, window)
            if self.max_class_fraction is None:
                break
            areas = np.bincount(sample.class_labels, weights=masks.areas())
            if areas.size and 0 < areas.max() <= self.max_class_fraction * areas.sum():
                break
        return window, masks


def _random_window(scaled: tuple[int, int], crop_size: tuple[int, int], rng: np.random.Generator) -> Window:
    height, width = min(scaled[0], crop_size[0]), min(scaled[1], crop_size[1])
    top = int(rng.integers(0, scaled[0] - height + 1))
    left = int(rng.integers(0, scaled[1] - width + 1))
    return Window(scaled, top, left, height, width)


def resample_image(image: np.ndarray, window: Window) -> np.ndarray:
    """Bilinear (h, w, 3) of a window; only the source pixels under the window are read."""
    step_y, step_x = image.shape[0] / window.scaled[0], image.shape[1] / window.scaled[1]
    box = (
        window.left * step_x,
        window.top * step_y,
        min((window.left + window.width) * step_x, image.shape[1]),
        min((window.top + window.height) * step_y, image.shape[0]),
    )
    resized = PILImage.fromarray(image).resize(
        (window.width, window.height), PILImage.Resampling.BILINEAR, box=box, reducing_gap=2.0
    )
    return np.asarray(resized)


def resample_masks(masks: SegmentMasks, window: Window) -> SegmentMasks:
    """The masks at the same window, each pixel taken from the nearest source pixel."""
    height, width = masks.size
    rows = (np.arange(window.top, window.top + window.height) + 0.5) * (height / window.scaled[0])
    columns = (np.arange(window.left, window.left + window.width) + 0.5) * (width / window.scaled[1])
    rows = np.minimum(rows.astype(np.int64), height - 1)[:, None]
    columns = np.minimum(columns.astype(np.int64), width - 1)[None, :]
    return masks.apply(lambda array: array[..., rows, columns])


def jitter_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast, saturation and hue of (H, W, 3) uint8, each with probability one half.

    The four are linear, so they are one 3x4 matrix and one pass over the image; values are clipped once, at the end.
    """
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
    rows = np.concatenate([matrix, np.full((3, 1), offset)], axis=1)  # (3, 4)
    return np.asarray(PILImage.fromarray(image).convert("RGB", tuple(rows.reshape(-1).tolist())))
