"""Preset names -> configurations: every number visible, its paper cited."""

import copy
from dataclasses import dataclass
from typing import Any

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

STAGES = ["stage1", "stage2", "stage3", "stage4"]
MASK2FORMER = "Mask2Former, Cheng et al., CVPR 2022, https://arxiv.org/abs/2112.01527"
PANOPTIC_SEGFORMER = "Panoptic SegFormer, Li et al., CVPR 2022, https://arxiv.org/abs/2109.03814"
MASKFORMER = "MaskFormer, Cheng et al., NeurIPS 2021, https://arxiv.org/abs/2107.06278"

LITE = (
    f"{MASKFORMER}; light pixel decoder after PEM, Cavagnero et al., CVPR 2024, https://arxiv.org/abs/2402.19422, and "
    "FastInst, He et al., CVPR 2023, https://arxiv.org/abs/2303.08594"
)


@dataclass(frozen=True)
class Preset:
    """A named member of the family."""

    summary: str
    paper: str
    fields: dict[str, Any]


def _resnet(
    *, depths: list[int], hidden_sizes: list[int], layer_type: str, embedding_size: int = 64
) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "depths": depths,
        "hidden_sizes": hidden_sizes,
        "layer_type": layer_type,
        "embedding_size": embedding_size,
        "out_features": STAGES,
    }


def _swin(*, embed_dim: int, depths: list[int], num_heads: list[int], window_size: int = 7) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": window_size,
        "drop_path_rate": 0.3,
        "out_features": STAGES,
    }


def _mask2former(backbone: dict[str, Any], **further: Any) -> dict[str, Any]:
    """The parts, sizes, weights and thresholds of all published Mask2Formers."""
    return {
        "backbone_config": backbone,
        "pixel_decoder": "deformable",
        "pixel_decoder_ffn_dim": 1024,
        "pixel_decoder_dropout": 0.0,
        "query_decoder": "masked",
        "query_decoder_layers": 9,
        "query_decoder_dropout": 0.0,
        "query_decoder_attention_dropout": 0.0,
        "query_decoder_activation_dropout": 0.0,
        "criterion": "points",
        "loss_class_weight": 2.0,
        "loss_mask_weight": 5.0,
        "loss_dice_weight": 5.0,
        "matcher_class_cost": 2.0,
        "matcher_mask_cost": 5.0,
        "matcher_dice_cost": 5.0,
        "image_size": [1024, 1024],
        "threshold": 0.8,
        **further,
    }


def _pvt_v2(*, hidden_sizes: list[int], depths: list[int]) -> dict[str, Any]:
    return {
        "model_type": "pvt_v2",
        "hidden_sizes": hidden_sizes,
        "depths": depths,
        "num_attention_heads": [1, 2, 5, 8],
        "mlp_ratios": [8, 8, 4, 4],
        "sr_ratios": [8, 4, 2, 1],
        "drop_path_rate": 0.1,
        "out_features": STAGES,
    }


def _panoptic_segformer(backbone: dict[str, Any], **further: Any) -> dict[str, Any]:
    """The parts, sizes, weights and thresholds of the published models; 300 queries for things, one for each of 53
    classes of stuff."""
    return {
        "backbone_config": backbone,
        "pixel_decoder": "deformable_memory",
        "pixel_decoder_ffn_dim": 1024,
        "query_decoder": "location",
        "query_decoder_ffn_dim": 1024,
        "num_queries": 353,
        "mask_head": "none",
        "class_head": "none",
        "class_activation": "sigmoid",
        "criterion": "location",
        "loss_class_weight": 2.0,
        "loss_dice_weight": 2.0,
        "matcher_class_cost": 2.0,
        "matcher_dice_cost": 2.0,
        "image_size": [800, 1333],
        "panoptic_merge": "mask_wise",
        "threshold": 0.25,
        "overlap_mask_area_threshold": 0.6,
        "stuff_overlap_mask_area_threshold": 0.8,
        **further,
    }


def _lite(**further: Any) -> dict[str, Any]:
    """Sizes of the members for real time; what makes them start fast from random weights is maskformer-light's."""
    return {
        "pixel_decoder": "light",
        "pixel_decoder_dim": 64,
        "pixel_decoder_heads": 4,
        "pixel_decoder_layers": 1,
        "pixel_decoder_ffn_dim": 256,
        "pixel_decoder_dropout": 0.0,
        "mask_dim": 64,
        "query_decoder_dim": 128,
        "query_decoder_heads": 4,
        "query_decoder_ffn_dim": 512,
        "query_decoder_layers": 2,
        "query_decoder_dropout": 0.0,
        "query_decoder_attention_dropout": 0.0,
        "query_decoder_activation_dropout": 0.0,
        "query_decoder_memory_stride": 16,
        "mask_head": "located_dot_product",
        "num_queries": 50,
        "criterion_resolution": "prediction",
        "loss_pixel_weight": 1.0,
        **further,
    }


BOTTLENECK_WIDTHS = [256, 512, 1024, 2048]
LIGHT: dict[str, Any] = {
    "backbone_config": _resnet(
        depths=[2, 2, 2, 2], hidden_sizes=[32, 64, 128, 256], layer_type="basic", embedding_size=32
    ),
    "pixel_decoder_dim": 64,
    "mask_dim": 64,
    "query_decoder_dim": 128,
    "query_decoder_heads": 4,
    "query_decoder_ffn_dim": 512,
    "query_decoder_layers": 3,
    "query_decoder_dropout": 0.0,
    "query_decoder_attention_dropout": 0.0,
    "query_decoder_activation_dropout": 0.0,
    "query_decoder_memory_stride": 8,
    "mask_head": "located_dot_product",
    "num_queries": 50,
    "criterion_resolution": "prediction",
    "loss_pixel_weight": 1.0,
}
# Of the light forms of Mask2Former and Panoptic SegFormer.
LIGHT_SIZES: dict[str, Any] = {
    "pixel_decoder_dim": 64,
    "pixel_decoder_heads": 4,
    "pixel_decoder_layers": 3,
    "pixel_decoder_ffn_dim": 256,
    "pixel_decoder_dropout": 0.0,
    "mask_dim": 64,
    "query_decoder_dim": 128,
    "query_decoder_heads": 4,
    "query_decoder_ffn_dim": 512,
    "query_decoder_dropout": 0.0,
    "query_decoder_attention_dropout": 0.0,
    "query_decoder_activation_dropout": 0.0,
    "num_queries": 100,
    "criterion_points": 3136,
}
PRESETS: dict[str, Preset] = {
    "maskformer-r50": Preset(
        summary="ResNet-50, FPN, 6 decoder layers; the published semantic model",
        paper=MASKFORMER,
        fields={
            "backbone_config": _resnet(depths=[3, 4, 6, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            "backbone_freeze_batch_norm": True,
        },
    ),
    "maskformer-r101": Preset(
        summary="ResNet-101, FPN, 6 decoder layers",
        paper=MASKFORMER,
        fields={
            "backbone_config": _resnet(depths=[3, 4, 23, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            "backbone_freeze_batch_norm": True,
        },
    ),
    "maskformer-r50-panoptic": Preset(
        summary="ResNet-50, transformer encoder on the coarsest map, FPN; the published COCO panoptic model",
        paper=MASKFORMER,
        fields={
            "backbone_config": _resnet(depths=[3, 4, 6, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            "backbone_freeze_batch_norm": True,
            "pixel_decoder": "fpn_transformer",
            "image_size": [800, 1333],
            "threshold": 0.8,
        },
    ),
    "maskformer-swin-tiny": Preset(
        summary="Swin-T, FPN, 6 decoder layers",
        paper=MASKFORMER,
        fields={"backbone_config": _swin(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])},
    ),
    "maskformer-swin-small": Preset(
        summary="Swin-S, FPN, 6 decoder layers",
        paper=MASKFORMER,
        fields={"backbone_config": _swin(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24])},
    ),
    "maskformer-swin-base": Preset(
        summary="Swin-B (window 12), FPN, 6 decoder layers",
        paper=MASKFORMER,
        fields={
            "backbone_config": _swin(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12),
            "image_size": [640, 640],
        },
    ),
    "maskformer-r18": Preset(
        summary="ResNet-18, FPN, 6 decoder layers at the published widths; our smaller sibling of maskformer-r50",
        paper=MASKFORMER,
        fields={
            "backbone_config": _resnet(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"),
        },
    ),
    "maskformer-light": Preset(
        summary="narrow ResNet-18, 64-wide pixel decoder, 3 decoder layers on 1/8 features; trains on a laptop",
        paper=MASKFORMER,
        fields=LIGHT,
    ),
    "maskformer-light-anchored": Preset(
        summary="maskformer-light with queries that start from the pixels of objects; for things, from random weights",
        paper=f"{MASKFORMER}; FastInst, He et al., CVPR 2023, https://arxiv.org/abs/2303.08594",
        fields={
            **LIGHT,
            "query_decoder": "anchored",
            "initialization": "torch",  # starts faster from random weights, see docs/paper_index.md
            "mask_head": "anchored_dot_product",
            "matcher": "located",
            "matcher_layers": "last",
            "num_queries": 100,
            "loss_class_weight": 2.0,
            "loss_dice_weight": 5.0,
        },
    ),
    "mask2former-light": Preset(
        summary="narrow ResNet-18, 64-wide deformable pixel decoder, 3 layers of masked attention; trains on a laptop",
        paper=MASK2FORMER,
        fields=_mask2former(  # what starts fast from random weights, see docs/paper_index.md
            LIGHT["backbone_config"],
            **{**LIGHT_SIZES, "pixel_decoder_layers": 1},
            query_decoder_layers=3,
            criterion_importance_ratio=0.0,
            query_decoder_memory_strides=[8],  # alone as good as all three in the paper's ablation of scales
            mask_head="located_dot_product",
            loss_pixel_weight=1.0,
            image_size=[512, 512],
            threshold=0.5,
        ),
    ),
    "mask2former-r50": Preset(
        summary="ResNet-50, deformable pixel decoder, 9 layers of masked attention",
        paper=MASK2FORMER,
        fields=_mask2former(
            _resnet(depths=[3, 4, 6, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            backbone_freeze_batch_norm=True,
        ),
    ),
    "mask2former-r101": Preset(
        summary="ResNet-101, deformable pixel decoder, 9 layers of masked attention",
        paper=MASK2FORMER,
        fields=_mask2former(
            _resnet(depths=[3, 4, 23, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            backbone_freeze_batch_norm=True,
        ),
    ),
    "mask2former-swin-tiny": Preset(
        summary="Swin-T, deformable pixel decoder, 9 layers of masked attention",
        paper=MASK2FORMER,
        fields=_mask2former(_swin(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])),
    ),
    "mask2former-swin-small": Preset(
        summary="Swin-S, deformable pixel decoder, 9 layers of masked attention",
        paper=MASK2FORMER,
        fields=_mask2former(_swin(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24])),
    ),
    "mask2former-swin-base": Preset(
        summary="Swin-B (window 12), deformable pixel decoder, 9 layers of masked attention",
        paper=MASK2FORMER,
        fields=_mask2former(_swin(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12)),
    ),
    "panoptic-segformer-light": Preset(
        summary="narrow ResNet-18, 64-wide deformable encoder, 100 queries for things and stuff; trains on a laptop",
        paper=PANOPTIC_SEGFORMER,
        fields=_panoptic_segformer(
            LIGHT["backbone_config"],
            **LIGHT_SIZES,
            query_decoder_layers=3,
            query_decoder_thing_mask_layers=2,
            query_decoder_stuff_mask_layers=2,
            image_size=[512, 512],
        ),
    ),
    "panoptic-segformer-r50": Preset(
        summary="ResNet-50, deformable encoder, things by boxes, masks from attention maps",
        paper=PANOPTIC_SEGFORMER,
        fields=_panoptic_segformer(
            _resnet(depths=[3, 4, 6, 3], hidden_sizes=BOTTLENECK_WIDTHS, layer_type="bottleneck"),
            backbone_freeze_batch_norm=True,
        ),
    ),
    "panoptic-segformer-pvtv2-b0": Preset(
        summary="PVTv2-B0, deformable encoder, things by boxes, masks from attention maps",
        paper=PANOPTIC_SEGFORMER,
        fields=_panoptic_segformer(_pvt_v2(hidden_sizes=[32, 64, 160, 256], depths=[2, 2, 2, 2])),
    ),
    "panoptic-segformer-pvtv2-b2": Preset(
        summary="PVTv2-B2, deformable encoder, things by boxes, masks from attention maps",
        paper=PANOPTIC_SEGFORMER,
        fields=_panoptic_segformer(_pvt_v2(hidden_sizes=[64, 128, 320, 512], depths=[3, 4, 6, 3])),
    ),
    "lite-mobilenetv3-small": Preset(
        summary="MobileNetV3-small, 64-wide separable pixel decoder, 2 decoder layers on 1/16 features; the smallest",
        paper=LITE,
        fields=_lite(backbone="timm/mobilenetv3_small_100"),
    ),
    "lite-mobilenetv3-large": Preset(
        summary="MobileNetV3-large, otherwise lite-mobilenetv3-small",
        paper=LITE,
        fields=_lite(backbone="timm/mobilenetv3_large_100"),
    ),
    "lite-mobilenetv4-small": Preset(
        summary="MobileNetV4-conv-small, otherwise lite-mobilenetv3-small",
        paper=LITE,
        fields=_lite(backbone="timm/mobilenetv4_conv_small"),
    ),
    "lite-swin-tiny": Preset(
        summary="Swin-T with a separable pixel decoder of 128 channels and 3 decoder layers on 1/16 features",
        paper=LITE,
        fields=_lite(
            backbone_config=_swin(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]),
            pixel_decoder_dim=128,
            pixel_decoder_ffn_dim=512,
            query_decoder_dim=256,
            query_decoder_heads=8,
            query_decoder_ffn_dim=1024,
            query_decoder_layers=3,
            num_queries=100,
        ),
    ),
}


def list_presets() -> list[str]:
    """Names that `preset` takes."""
    return list(PRESETS)


def preset(name: str, **overrides: Any) -> HfMaskFormerConfig:
    """The configuration of a preset, with any field overridden; `backbone` and `backbone_config` replace each other.

    Raises:
        ValueError: Unknown preset, or an override that is no field or contradicts another.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; available: {', '.join(PRESETS)}.")
    fields = copy.deepcopy(PRESETS[name].fields)
    for given, other in (("backbone", "backbone_config"), ("backbone_config", "backbone")):
        if overrides.get(given) is not None:
            fields.pop(other, None)
    return HfMaskFormerConfig(**{**fields, **overrides})


def image_processor_for(config: HfMaskFormerConfig, **overrides: Any) -> HfMaskFormerImageProcessor:
    """The image processor that belongs to a configuration: same canvas, labels, task and thresholds."""
    height, width = config.image_size
    settings = {
        "size": {"max_height": height, "max_width": width},
        "id2label": config.id2label,
        "thing_label_ids": config.thing_label_ids,
        "ignore_index": config.ignore_index,
        "task": config.task,
        "class_activation": config.class_activation,
        "threshold": config.threshold,
        "mask_threshold": config.mask_threshold,
        "overlap_mask_area_threshold": config.overlap_mask_area_threshold,
        "stuff_overlap_mask_area_threshold": config.stuff_overlap_mask_area_threshold,
        "panoptic_merge": config.panoptic_merge,
    }
    return HfMaskFormerImageProcessor(**{**settings, **overrides})
