"""Augmentation keeps image and masks together, is reproducible, and removes what is cropped away."""

import numpy as np
import pytest

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.data.transforms import map_colours, random_colour_matrix
from hf_maskformer.data.windows import Window, resample_image, resample_masks

PLAIN = {"scale_range": (1.0, 1.0), "flip_probability": 0.0, "color_jitter": False}


def make_sample(height: int = 40, width: int = 60, overlap: bool = False) -> Sample:
    """An image whose first channel is 200 inside mask 0 and whose second is 200 inside mask 1."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, height, width), dtype=bool)
    masks[0, 4:20, 6:30] = True
    masks[1, 10:38, (20 if overlap else 32) : 55] = True
    image = rng.integers(0, 20, (height, width, 3), dtype=np.uint8)
    image[masks[0], 0] = 200
    image[masks[1], 1] = 200
    return Sample(image, masks, np.array([3, 5]), image_id="7", file_name="a.png")


def test_without_chance_nothing_changes() -> None:
    sample = make_sample()
    result = TrainAugmentation((40, 60), **PLAIN)(sample, np.random.default_rng(0))
    np.testing.assert_array_equal(result.image, sample.image)
    np.testing.assert_array_equal(result.masks, sample.masks)
    assert (result.image_id, result.file_name) == ("7", "a.png")


def test_flip_mirrors_image_and_masks() -> None:
    sample = make_sample()
    result = TrainAugmentation((40, 60), **(PLAIN | {"flip_probability": 1.0}))(sample, np.random.default_rng(0))
    np.testing.assert_array_equal(result.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(result.masks, sample.masks[..., ::-1])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_the_image(overlap: bool, seed: int) -> None:
    """The painted channels must agree with the masks up to the pixels that interpolation blurs at the border."""
    augmentation = TrainAugmentation((48, 48), scale_range=(0.6, 2.5), color_jitter=False)
    result = augmentation(make_sample(overlap=overlap), np.random.default_rng(seed))
    assert result.image.shape[0] <= 48
    assert result.image.shape[1] <= 48
    assert result.image.shape[:2] == result.masks.shape[1:]
    for mask, label in zip(result.masks, result.class_labels.tolist(), strict=True):
        painted = result.image[..., {3: 0, 5: 1}[label]] > 110
        assert (painted == mask).mean() > 0.97


def test_the_result_is_a_function_of_the_generator() -> None:
    augmentation = TrainAugmentation((32, 32))
    one, two, other = (augmentation(make_sample(), np.random.default_rng(seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.masks, two.masks)
    assert one.image.shape != other.image.shape or (one.image != other.image).any()


def test_scale_is_relative_to_the_size_that_fits() -> None:
    half = TrainAugmentation((80, 90), **(PLAIN | {"scale_range": (0.5, 0.5)}))
    assert half(make_sample(), np.random.default_rng(0)).image.shape == (30, 45, 3)  # fits at 60x90
    double = TrainAugmentation((80, 90), **(PLAIN | {"scale_range": (2.0, 2.0)}))
    assert double(make_sample(), np.random.default_rng(0)).image.shape == (80, 90, 3)


def test_masks_that_are_cropped_away_are_removed() -> None:
    masks = np.zeros((3, 40, 40), dtype=bool)
    masks[0, 0, 0] = masks[1, :, :] = masks[2, 39, 39] = True
    sample = Sample(np.zeros((40, 40, 3), np.uint8), masks, np.array([0, 1, 2]), np.array([False, True, False]))
    result = TrainAugmentation((10, 10), **(PLAIN | {"scale_range": (4.0, 4.0)}))(sample, np.random.default_rng(1))
    assert result.class_labels.tolist() == [1]
    assert result.iscrowd.tolist() == [True]
    assert result.masks.all()
    assert result.masks.shape == (1, 10, 10)


def test_a_sample_without_masks_stays_one() -> None:
    sample = Sample(np.zeros((40, 40, 3), np.uint8), np.zeros((0, 40, 40)), np.zeros(0))
    result = TrainAugmentation((16, 16), max_class_fraction=0.5)(sample, np.random.default_rng(1))
    assert result.masks.shape == (0, *result.image.shape[:2])


def test_max_class_fraction_avoids_crops_of_one_class() -> None:
    """A quarter of the picture is class 1; a crop of half the side is often all class 0."""
    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[1, :32, :32] = True
    masks[0] = ~masks[1]
    sample = Sample(np.zeros((64, 64, 3), np.uint8), masks, np.array([0, 1]))
    options = PLAIN | {"scale_range": (2.0, 2.0)}

    def alone(fraction: float | None) -> int:
        augmentation = TrainAugmentation((32, 32), **options, max_class_fraction=fraction)
        results = [augmentation(sample, np.random.default_rng(seed)) for seed in range(40)]
        return sum(result.masks.mean(axis=(1, 2)).max() > 0.75 for result in results)

    assert alone(None) > 20
    assert alone(0.75) < 5


def test_window_is_the_crop_of_the_whole_resized_image() -> None:
    sample = load("scenes", length=1, image_size=96).sample(0)
    whole = resample_image(sample.image, Window((144, 144), 0, 0, 144, 144))
    part = resample_image(sample.image, Window((144, 144), 30, 50, 64, 48))
    inner = np.s_[3:-3, 3:-3]
    difference = np.abs(whole[30:94, 50:98].astype(int) - part.astype(int))[inner]
    assert difference.max() <= 2
    masks = resample_masks(sample.segments, Window((144, 144), 0, 0, 144, 144)).top_map()
    cropped = resample_masks(sample.segments, Window((144, 144), 30, 50, 64, 48)).top_map()
    np.testing.assert_array_equal(masks[30:94, 50:98], cropped)


def test_nearest_masks_at_double_and_half_size() -> None:
    masks = SegmentMasks.from_id_map(np.array([[1, 2], [3, 0]]), 3)
    doubled = resample_masks(masks, Window((4, 4), 0, 0, 4, 4)).top_map()
    np.testing.assert_array_equal(doubled, np.kron([[1, 2], [3, 0]], np.ones((2, 2))))
    np.testing.assert_array_equal(resample_masks(masks, Window((4, 4), 1, 1, 2, 2)).top_map(), [[1, 2], [3, 0]])


def test_jitter_of_grey_stays_grey_and_changes_brightness() -> None:
    grey = np.full((4, 4, 3), 128, dtype=np.uint8)
    values = []
    for seed in range(30):
        result = map_colours(grey, random_colour_matrix(np.random.default_rng(seed)))
        assert result.std(axis=2).max() <= 1, "saturation and hue leave grey alone"
        values.append(int(result[0, 0, 0]))
    assert min(values) < 90
    assert max(values) > 165


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_range": (0.0, 1.0)}, "scale_range must be"),
        ({"scale_range": (2.0, 1.0)}, "scale_range must be"),
        ({"flip_probability": 1.5}, "flip_probability must be in 0..1, got 1.5"),
        ({"max_class_fraction": 0.0}, "max_class_fraction must be"),
        ({"crop_size": (0, 8)}, "crop_size must be"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainAugmentation(**({"crop_size": (8, 8)} | options))
