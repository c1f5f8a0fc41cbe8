"""Each preset holds the numbers of its published configuration."""

import numpy as np
import pytest

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.augment_presets import augmentation_preset, list_augmentation_presets
from hf_maskformer.data.sample import Sample
from hf_maskformer.data.transforms import ResizeShortestEdge


@pytest.mark.parametrize(
    ("name", "crop", "smallest", "largest", "count", "longest"),
    [
        ("maskformer-ade20k-semantic", (512, 512), 256, 1024, 16, 2048),
        ("maskformer-ade20k-panoptic", (640, 640), 320, 1280, 16, 2560),
        ("maskformer-cityscapes-semantic", (512, 1024), 512, 2048, 16, 4096),
        ("maskformer-coco-stuff-10k-semantic", (640, 640), 320, 960, 11, 2560),
        ("maskformer-mapillary-semantic", (1280, 1280), 1024, 4096, 16, 8192),
        ("mask2former-ade20k", (640, 640), 320, 1280, 16, 2560),
        ("mask2former-cityscapes", (512, 1024), 512, 2048, 16, 4096),
        ("mask2former-mapillary", (1024, 1024), 1024, 4096, 16, 8192),
    ],
)
def test_shortest_edge_presets(
    name: str, crop: tuple[int, int], smallest: int, largest: int, count: int, longest: int
) -> None:
    augmentation = augmentation_preset(name)
    resize = augmentation.resize
    assert isinstance(resize, ResizeShortestEdge)
    assert augmentation.crop_size == crop
    assert (min(resize.sizes), max(resize.sizes), len(resize.sizes), resize.max_size) == (
        smallest,
        largest,
        count,
        longest,
    )
    assert augmentation.color_jitter
    assert augmentation.flip_probability == 0.5
    assert augmentation.max_class_fraction is None  # SINGLE_CATEGORY_MAX_AREA is 1.0


@pytest.mark.parametrize(("name", "pasted"), [("mask2former-coco", 0.0), ("copy-paste-coco-instance", 1.0)])
def test_large_scale_jitter(name: str, pasted: float) -> None:
    expected = TrainAugmentation((1024, 1024), (0.1, 2.0), color_jitter=False, copy_paste_probability=pasted)
    assert augmentation_preset(name) == expected


def test_another_crop_keeps_the_proportions() -> None:
    augmentation = augmentation_preset("maskformer-cityscapes-semantic", (128, 256))
    resize = augmentation.resize
    assert isinstance(resize, ResizeShortestEdge)
    assert augmentation.crop_size == (128, 256)
    assert (min(resize.sizes), max(resize.sizes), resize.max_size) == (128, 512, 1024)
    assert augmentation_preset("mask2former-coco", (64, 64)).scale_range == (0.1, 2.0)


def test_detr_sizes() -> None:
    """From 600 x 900: half of the results keep the aspect with a shorter side of 480..800, the others are crops."""
    augmentation = augmentation_preset("maskformer-coco-panoptic")
    sample = Sample(np.zeros((600, 900, 3), np.uint8), np.ones((1, 600, 900), bool), np.array([0]))
    sizes = [augmentation(sample, np.random.default_rng(seed)).image.shape[:2] for seed in range(40)]
    assert all(min(size) in range(480, 801, 32) or max(size) == 1333 for size in sizes)
    assert all(max(size) <= 1333 for size in sizes)
    whole = sum(abs(size[1] / size[0] - 1.5) < 0.01 for size in sizes)
    assert 10 <= whole <= 30
    assert not augmentation.color_jitter


def test_names_and_refusals() -> None:
    assert "mask2former-coco" in list_augmentation_presets()
    with pytest.raises(ValueError, match=r"augmentation 'lsj' is not known, allowed: copy-paste-coco-instance, mask2"):
        augmentation_preset("lsj")
    with pytest.raises(ValueError, match=r"'maskformer-coco-panoptic': this augmentation has crops of random size"):
        augmentation_preset("maskformer-coco-panoptic", (512, 512))
