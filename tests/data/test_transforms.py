"""Our transforms among those of torchvision.transforms.v2: masks follow the image, whatever moves it."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from hf_maskformer.data.augment import TrainAugmentation, TransformAugmentation
from hf_maskformer.data.sample import Sample
from hf_maskformer.data.transforms import (
    LargeScaleJitter,
    PhotometricDistortion,
    RandomCrop,
    RandomCropRange,
    ResizeShortestEdge,
    WindowChain,
)
from hf_maskformer.data.windows import Window, resample_image, resample_masks

STILL = {"scale_range": (1.0, 1.0), "flip_probability": 0.0, "color_jitter": False}


def painted_sample(overlap: bool = False) -> Sample:
    """Mask 0 is painted in the first channel, mask 1 in the second; (40, 60)."""
    masks = np.zeros((2, 40, 60), dtype=bool)
    masks[0, 4:20, 6:30] = True
    masks[1, 10:38, (20 if overlap else 32) : 55] = True
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = masks[0] * 255, masks[1] * 255
    return Sample(image, masks, np.array([3, 5]), file_name="a.png")


def assert_painted(result: Sample) -> None:
    for mask, label in zip(result.masks, result.class_labels.tolist(), strict=True):
        np.testing.assert_array_equal(result.image[..., {3: 0, 5: 1}[label]] == 255, mask)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "transforms",
    [
        v2.RandomVerticalFlip(1.0),
        v2.RandomHorizontalFlip(1.0),
        v2.RandomRotation((90, 90), expand=True),
        v2.RandomRotation(30),  # nearest, like masks
        v2.RandomCrop((20, 25)),
        RandomCrop((20, 25)),
        RandomCropRange(10, 50),
        v2.Compose([RandomCrop((30, 30)), v2.RandomVerticalFlip(0.5), v2.RandomCrop((20, 20))]),
        v2.RandomChoice([RandomCrop((30, 30)), v2.RandomRotation(10)]),
    ],
)
def test_masks_follow_exactly(transforms: v2.Transform, overlap: bool) -> None:
    augmentation = TrainAugmentation((40, 60), **STILL, transforms=transforms)
    for seed in range(4):
        assert_painted(augmentation(painted_sample(overlap), np.random.default_rng(seed)))


def test_colour_and_blur_leave_masks_alone() -> None:
    sample = painted_sample()
    for transform in (v2.GaussianBlur(5, 2.0), PhotometricDistortion()):
        results = [TransformAugmentation(transform)(sample, np.random.default_rng(seed)) for seed in range(6)]
        assert any((result.image != sample.image).any() for result in results)
        for result in results:
            np.testing.assert_array_equal(result.masks, sample.masks)


def test_the_result_is_a_function_of_the_generator_and_torch_is_left_alone() -> None:
    pipeline = v2.Compose([LargeScaleJitter((32, 32)), RandomCrop((32, 32)), v2.ColorJitter(0.5)])
    augmentation = TrainAugmentation((32, 32), transforms=pipeline)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = augmentation(painted_sample(), np.random.default_rng(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    two = augmentation(painted_sample(), np.random.default_rng(4))
    other = augmentation(painted_sample(), np.random.default_rng(5))
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.masks, two.masks)
    assert one.image.shape != other.image.shape or (one.image != other.image).any()


def test_a_crop_is_a_slice() -> None:
    """Every pixel is known by its value."""
    values = np.arange(40 * 60).reshape(40, 60)
    image = np.stack([values % 256, values // 256, values * 0], axis=2).astype(np.uint8)
    sample = Sample(image, (values % 2 == 0)[None], np.array([0]))
    result = TransformAugmentation(RandomCrop((7, 9)))(sample, np.random.default_rng(0))
    assert result.image.shape == (7, 9, 3)
    top, left = divmod(int(result.image[0, 0, 0]) + 256 * int(result.image[0, 0, 1]), 60)
    part = np.s_[top : top + 7, left : left + 9]
    np.testing.assert_array_equal(result.image, image[part])
    np.testing.assert_array_equal(result.masks[0], sample.masks[0][part])


def test_flipping_twice_gives_the_sample_back() -> None:
    flips = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0)])
    augmentation = TrainAugmentation(
        (40, 60), **(STILL | {"flip_probability": 1.0}), vertical_flip_probability=1.0, transforms=flips
    )
    result = augmentation(painted_sample(overlap=True), np.random.default_rng(0))
    np.testing.assert_array_equal(result.image, painted_sample(overlap=True).image)
    np.testing.assert_array_equal(result.masks, painted_sample(overlap=True).masks)


def test_sizes_of_the_resizes() -> None:
    sample = painted_sample()

    def size(transform: v2.Transform) -> tuple[int, int]:
        return TransformAugmentation(transform)(sample, np.random.default_rng(0)).image.shape[:2]

    assert size(LargeScaleJitter((80, 90), (0.5, 0.5))) == (30, 45)  # 60 x 90 fits
    assert size(ResizeShortestEdge((20,))) == (20, 30)
    assert size(ResizeShortestEdge((80,), max_size=90)) == (60, 90)
    assert size(WindowChain([ResizeShortestEdge((20,))], skip=1.0)) == (40, 60)
    assert size(RandomCrop((100, 30))) == (40, 30)


def test_a_chain_is_its_steps_resampled_once() -> None:
    """Shorter side 80, the middle 40 x 40 of it, then 20: source rows 10..29 and columns 20..39, one by one."""
    window = Window.whole((40, 60)).resized((80, 120)).cropped(20, 40, (40, 40)).resized((20, 20))
    assert window == Window((40, 60), 10, 20, 20, 20)
    sample = painted_sample()
    np.testing.assert_array_equal(resample_image(sample.image, window), sample.image[10:30, 20:40])
    np.testing.assert_array_equal(resample_masks(sample.segments, window).dense(), sample.masks[:, 10:30, 20:40])


def test_semantic_maps_of_v2_pipelines() -> None:
    """A mask (H, W) of class values is moved too, and its values are the classes of max_class_fraction."""
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:] = 1
    labels[:32, :32] = 2
    image = tv_tensors.Image(torch.from_numpy(np.repeat(labels[None] * 100, 3, axis=0)))
    crop = RandomCrop((32, 32), max_class_fraction=0.75)
    mixed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        moved, mask = crop(image, tv_tensors.Mask(torch.from_numpy(labels)))
        assert torch.equal(moved[0], mask * 100)
        mixed += int((mask == 1).float().mean() <= 0.75)
    assert mixed > 15


def test_boxes_are_refused() -> None:
    boxes = tv_tensors.BoundingBoxes([[0, 0, 4, 4]], format="XYXY", canvas_size=(40, 60))
    with pytest.raises(ValueError, match="RandomCrop moves images and masks, got BoundingBoxes"):
        RandomCrop((8, 8))({"image": tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8)), "boxes": boxes})


def test_a_transform_that_returns_floats_is_refused() -> None:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    with pytest.raises(ValueError, match=r"a\.png: transforms must return an image .* uint8 .*float32"):
        TransformAugmentation(to_float)(painted_sample(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LargeScaleJitter((8, 0)), "target_size must be"),
        (lambda: ResizeShortestEdge(()), "sizes must be"),
        (lambda: ResizeShortestEdge((8,), 0), "max_size must be"),
        (lambda: RandomCropRange(9, 8), "smallest and largest must be"),
        (lambda: WindowChain([], skip=2.0), "skip must be"),
        (lambda: TrainAugmentation(None), "crop_size None needs a resize"),
        (lambda: TrainAugmentation((8, 8), vertical_flip_probability=-1.0), "vertical_flip_probability must be"),
        (lambda: TrainAugmentation((8, 8), copy_paste_probability=2.0), "copy_paste_probability must be"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
