"""Random scale, crop, flip and colour for training: a sample in, a smaller sample out, one resampling in between.

The default is the scale jitter of Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method" (CVPR 2021),
as used by Mask2Former. `data/transforms.py` holds the single steps, `data/augment_presets.py` the published recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hf_maskformer.data.sample import Sample
from hf_maskformer.data.transforms import (
    LargeScaleJitter,
    RandomCrop,
    WindowTransform,
    apply_transforms,
    check_size,
    class_areas,
    map_colours,
    random_colour_matrix,
)
from hf_maskformer.data.windows import Window, resample_image, resample_masks

PROBABILITIES = ("flip_probability", "vertical_flip_probability", "copy_paste_probability")


@dataclass(frozen=True)
class TrainAugmentation:
    """Callable (sample, rng) -> sample that is at most `crop_size`; padding is the processor's work.

    Args:
        crop_size: (H, W) of the result; smaller where the scaled image is smaller. None: no crop, `resize` says all.
        scale_range: limits of the scale; 1 = the whole image just fits inside `crop_size`. Not used with `resize`.
        flip_probability: of a horizontal flip.
        color_jitter: whether brightness, contrast, saturation and hue change.
        max_class_fraction: largest part of the labelled pixels that one class may take, or None for any.
        vertical_flip_probability: of a vertical flip.
        resize: what comes before the crop, instead of the jitter by `scale_range`.
        transforms: any transform of torchvision.transforms.v2, or a Compose of them, for the result; see
            `data/transforms.py` for the form of a sample there.
        copy_paste_probability: how often `TrainingDataset` and `TrainingStream` paste objects of another image on the
            result.
    """

    crop_size: tuple[int, int] | None
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    color_jitter: bool = True
    max_class_fraction: float | None = None
    vertical_flip_probability: float = 0.0
    resize: WindowTransform | None = None
    transforms: Callable[[Any], Any] | None = None
    copy_paste_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.crop_size is None and (self.resize is None or self.max_class_fraction is not None):
            raise ValueError("crop_size None needs a resize and no max_class_fraction")
        if self.crop_size is not None:
            check_size(self.crop_size, "crop_size")
        self.windows()  # each step checks its own numbers

    def windows(self) -> tuple[WindowTransform, ...]:
        """The resize and the crop."""
        if self.crop_size is None:
            return () if self.resize is None else (self.resize,)
        resize = self.resize or LargeScaleJitter(self.crop_size, self.scale_range)
        return resize, RandomCrop(self.crop_size, self.max_class_fraction)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The same state of `rng` gives the same result. Masks that are left without a pixel are removed."""
        window = Window.whole(sample.segments.size)
        for step in self.windows():
            window = step.next_window(window, rng, partial(class_areas, sample.segments, sample.class_labels))
        image = resample_image(sample.image, window)
        masks = resample_masks(sample.segments, window)
        if rng.random() < self.flip_probability:
            image, masks = image[:, ::-1], masks.apply(_flip_columns)
        if self.vertical_flip_probability > 0 and rng.random() < self.vertical_flip_probability:
            image, masks = image[::-1], masks.apply(_flip_rows)
        if self.color_jitter:
            image = map_colours(image, random_colour_matrix(rng))
        result = sample.with_masks(np.ascontiguousarray(image), masks)
        return result if self.transforms is None else apply_transforms(result, self.transforms, rng)


@dataclass(frozen=True)
class TransformAugmentation:
    """Callable (sample, rng) -> sample that is nothing but v2 transforms, ours among them.

    Each of them resamples on its own, and masks are decoded whole: `TrainAugmentation` is faster where it suffices.
    """

    transforms: Callable[[Any], Any]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return apply_transforms(sample, self.transforms, rng)


def _flip_columns(layers: np.ndarray) -> np.ndarray:
    return layers[..., ::-1]


def _flip_rows(layers: np.ndarray) -> np.ndarray:
    return layers[..., ::-1, :]
