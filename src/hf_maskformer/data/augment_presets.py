"""The augmentations that published models were trained with, by name.

The numbers are those of the authors' configuration files: MaskFormer (Cheng et al., "Per-Pixel Classification is Not
All You Need for Semantic Segmentation", NeurIPS 2021), Mask2Former (Cheng et al., "Masked-attention Mask Transformer
for Universal Image Segmentation", CVPR 2022) and Copy-Paste (Ghiasi et al., "Simple Copy-Paste is a Strong Data
Augmentation Method for Instance Segmentation", CVPR 2021). Departures: the order of crop, colour and flip; colour is
one linear map without SSD's swap of the channels; images smaller than the crop are padded by the processor and
masked, where the authors pad with grey; Mask2Former's crop draws one number for both axes, here each has its own.
"""

from collections.abc import Callable
from functools import partial

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.transforms import RandomCropRange, ResizeShortestEdge, WindowChain, WindowTransform

LONGEST_PER_BASE = 4  # MAX_SIZE_TRAIN / base in every semantic configuration of both repositories
# DETR's, as in MaskFormer's coco-panoptic configuration and its detr_panoptic mapper.
DETR_SIZES = tuple(range(480, 801, 32))
DETR_MAX_SIZE = 1333
DETR_SIZES_BEFORE_CROP = (400, 500, 600)
DETR_CROP_RANGE = (384, 600)
DETR_CROP_PROBABILITY = 0.5
LARGE_SCALE_RANGE = (0.1, 2.0)  # Ghiasi et al., sec. 3; Mask2Former, sec. 4.1


def shortest_edge_augmentation(
    crop_size: tuple[int, int] | None, *, published_crop: tuple[int, int], base: int, tenths: tuple[int, int]
) -> TrainAugmentation:
    """Shorter side drawn from `tenths[0]`/10 .. `tenths[1]`/10 of `base` in steps of 1/10, crop, colour, flip.

    With another crop than the published one, `base` changes in proportion to the crop's shorter side. The limit for
    one class's part of a crop is 1.0 in all of these configurations: there is none.
    """
    crop_size = crop_size or published_crop
    base = round(base * min(crop_size) / min(published_crop))
    sizes = tuple(max(1, int(step * 0.1 * base)) for step in range(tenths[0], tenths[1] + 1))
    return TrainAugmentation(crop_size, resize=ResizeShortestEdge(sizes, LONGEST_PER_BASE * base))


def large_scale_jitter_augmentation(
    crop_size: tuple[int, int] | None, *, copy_paste_probability: float = 0.0
) -> TrainAugmentation:
    """Scale 0.1 to 2.0 of what fits 1024 x 1024, crop, flip; no colour."""
    return TrainAugmentation(
        crop_size or (1024, 1024),
        scale_range=LARGE_SCALE_RANGE,
        color_jitter=False,
        copy_paste_probability=copy_paste_probability,
    )


def detr_augmentation(crop_size: tuple[int, int] | None) -> TrainAugmentation:
    """Half of the images: shorter side 480 to 800. The others: 400 to 600, a crop of 384 to 600, then the same.

    Flip; no colour. The result is at most 1333 long and of no fixed size.
    """
    if crop_size is not None:
        raise ValueError(f"this augmentation has crops of random size, crop_size must be None, got {crop_size}")
    crop: list[WindowTransform] = [ResizeShortestEdge(DETR_SIZES_BEFORE_CROP), RandomCropRange(*DETR_CROP_RANGE)]
    resize = ResizeShortestEdge(DETR_SIZES, DETR_MAX_SIZE)
    chain = WindowChain([WindowChain(crop, skip=1 - DETR_CROP_PROBABILITY), resize])
    return TrainAugmentation(None, resize=chain, color_jitter=False)


HALF_TO_DOUBLE = (5, 20)
_ade20k_512 = partial(shortest_edge_augmentation, published_crop=(512, 512), base=512, tenths=HALF_TO_DOUBLE)
_ade20k_640 = partial(shortest_edge_augmentation, published_crop=(640, 640), base=640, tenths=HALF_TO_DOUBLE)
_cityscapes = partial(shortest_edge_augmentation, published_crop=(512, 1024), base=1024, tenths=HALF_TO_DOUBLE)

# Name -> (what it is for, how it is made).
AUGMENTATION_PRESETS: dict[str, tuple[str, Callable[[tuple[int, int] | None], TrainAugmentation]]] = {
    "maskformer-ade20k-semantic": ("configs/ade20k-150; Mask2Former's ade20k/semantic is the same", _ade20k_512),
    "maskformer-ade20k-panoptic": ("configs/ade20k-150-panoptic", _ade20k_640),
    "maskformer-cityscapes-semantic": ("configs/cityscapes-19", _cityscapes),
    "maskformer-coco-stuff-10k-semantic": (
        "configs/coco-stuff-10k-171",
        partial(shortest_edge_augmentation, published_crop=(640, 640), base=640, tenths=(5, 15)),
    ),
    "maskformer-mapillary-semantic": (
        "configs/mapillary-vistas-65",
        partial(shortest_edge_augmentation, published_crop=(1280, 1280), base=2048, tenths=HALF_TO_DOUBLE),
    ),
    "maskformer-coco-panoptic": ("configs/coco-panoptic", detr_augmentation),
    "mask2former-coco": (
        "configs/coco, instance and panoptic: large-scale jitter",
        large_scale_jitter_augmentation,
    ),
    "mask2former-ade20k": ("configs/ade20k, instance and panoptic", _ade20k_640),
    "mask2former-cityscapes": ("configs/cityscapes, all three tasks", _cityscapes),
    "mask2former-mapillary": (
        "configs/mapillary-vistas, semantic and panoptic",
        partial(shortest_edge_augmentation, published_crop=(1024, 1024), base=2048, tenths=HALF_TO_DOUBLE),
    ),
    "copy-paste-coco-instance": (
        "Ghiasi et al., sec. 3: large-scale jitter, and objects of a second image on every image",
        partial(large_scale_jitter_augmentation, copy_paste_probability=1.0),
    ),
}


def list_augmentation_presets() -> list[str]:
    return sorted(AUGMENTATION_PRESETS)


def augmentation_preset(name: str, crop_size: tuple[int, int] | None = None) -> TrainAugmentation:
    """The augmentation of this name, at its published crop or at `crop_size` (H, W).

    Raises:
        ValueError: there is no such name, or it has no crop of fixed size and `crop_size` is given.
    """
    if name not in AUGMENTATION_PRESETS:
        allowed = ", ".join(list_augmentation_presets())
        raise ValueError(f"augmentation {name!r} is not known, allowed: {allowed}")
    _, make = AUGMENTATION_PRESETS[name]
    try:
        return make(crop_size)
    except ValueError as error:
        raise ValueError(f"augmentation {name!r}: {error}") from error
