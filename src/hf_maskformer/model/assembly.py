"""The one place where a configuration becomes parts: every part, and the fields that it is built from."""

from typing import Any

from torch import nn

from .backbone import Backbone
from .class_head import LinearClassHead
from .configuration_hf_maskformer import HfMaskFormerConfig
from .criterion import Criterion
from .location_criterion import LocationCriterion
from .mask_head import AnchoredDotProductMaskHead, DotProductMaskHead, LocatedDotProductMaskHead
from .pixel_decoder_deformable import DeformableMemory, DeformablePixelDecoder
from .pixel_decoder_fpn import FpnPixelDecoder, TransformerFpnPixelDecoder
from .pixel_decoder_light import LightPixelDecoder
from .point_criterion import PointCriterion
from .query_decoder_anchored import AnchoredQueryDecoder
from .query_decoder_location import LocationQueryDecoder
from .query_decoder_masked import MaskedQueryDecoder
from .query_decoder_standard import StandardQueryDecoder

QUERY_DECODER_FIELDS = (
    "dim",
    "layers",
    "heads",
    "ffn_dim",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "activation",
)
MASK_HEADS = {
    "dot_product": DotProductMaskHead,
    "located_dot_product": LocatedDotProductMaskHead,
    "anchored_dot_product": AnchoredDotProductMaskHead,
}


def build_backbone(config: HfMaskFormerConfig) -> Backbone:
    return Backbone(
        config.backbone_config,
        neck=config.backbone_neck,
        neck_dim=config.pixel_decoder_dim,
        freeze_batch_norm=config.backbone_freeze_batch_norm,
        num_channels=config.num_channels,
    )


def build_pixel_decoder(config: HfMaskFormerConfig, channels: list[int]) -> nn.Module:
    if config.pixel_decoder == "fpn":
        return FpnPixelDecoder(channels, dim=config.pixel_decoder_dim, mask_dim=config.mask_dim)
    sizes = _fields(config, "pixel_decoder", "dim", "layers", "heads", "ffn_dim", "dropout")
    if config.pixel_decoder == "fpn_transformer":
        return TransformerFpnPixelDecoder(channels, mask_dim=config.mask_dim, **sizes)
    if config.pixel_decoder == "light":
        return LightPixelDecoder(channels, mask_dim=config.mask_dim, **sizes)
    if config.pixel_decoder == "deformable_memory":
        return DeformableMemory(channels, points=config.pixel_decoder_points, **sizes)
    return DeformablePixelDecoder(channels, mask_dim=config.mask_dim, points=config.pixel_decoder_points, **sizes)


def build_query_decoder(config: HfMaskFormerConfig, memory_channels: Any) -> nn.Module:
    sizes = _fields(config, "query_decoder", *QUERY_DECODER_FIELDS)
    stuff = config.num_labels - len(config.thing_label_ids or ())
    if config.query_decoder == "standard":
        stride = config.query_decoder_memory_stride
        return StandardQueryDecoder(memory_channels, num_queries=config.num_queries, memory_stride=stride, **sizes)
    if config.query_decoder == "anchored":
        return AnchoredQueryDecoder(
            memory_channels,
            mask_dim=config.mask_dim,
            num_queries=config.num_queries,
            num_stuff=stuff,
            memory_stride=config.query_decoder_memory_stride,
            **sizes,
        )
    if config.query_decoder == "location":
        return LocationQueryDecoder(
            memory_channels,
            points=config.query_decoder_points,
            num_thing_queries=config.num_queries - stuff,
            num_labels=config.num_labels,
            thing_label_ids=config.thing_label_ids or (),
            thing_mask_layers=config.query_decoder_thing_mask_layers,
            stuff_mask_layers=config.query_decoder_stuff_mask_layers,
            **sizes,
        )
    strides = config.query_decoder_memory_strides
    return MaskedQueryDecoder(memory_channels, num_queries=config.num_queries, memory_strides=strides, **sizes)


def build_class_head(config: HfMaskFormerConfig) -> LinearClassHead | None:
    if config.class_head == "none":
        return None
    return LinearClassHead(config.query_decoder_dim, num_labels=config.num_labels)


def build_mask_head(config: HfMaskFormerConfig) -> DotProductMaskHead | None:
    if config.mask_head == "none":
        return None
    head = MASK_HEADS[config.mask_head]
    return head(config.query_decoder_dim, mask_dim=config.mask_dim, layers=config.mask_head_layers)


def build_criterion(config: HfMaskFormerConfig) -> Criterion | LocationCriterion:
    if config.criterion == "location":
        return _location_criterion(config)
    shared: dict[str, Any] = {
        "num_labels": config.num_labels,
        "matcher": config.matcher,
        "class_weight": config.loss_class_weight,
        "mask_weight": config.loss_mask_weight,
        "dice_weight": config.loss_dice_weight,
        "pixel_weight": config.loss_pixel_weight,
        "no_object_weight": config.loss_no_object_weight,
        "class_cost": config.matcher_class_cost,
        "mask_cost": config.matcher_mask_cost,
        "dice_cost": config.matcher_dice_cost,
        "focal_alpha": config.loss_focal_alpha,
        "focal_gamma": config.loss_focal_gamma,
        "matched_layers": config.matcher_layers,
        "thing_label_ids": config.thing_label_ids or (),
    }
    if config.criterion == "points":
        return PointCriterion(
            points=config.criterion_points,
            oversample_ratio=config.criterion_oversample_ratio,
            importance_ratio=config.criterion_importance_ratio,
            **shared,
        )
    return Criterion(
        location_cost=config.matcher_location_cost,
        resolution=config.criterion_resolution,
        objectness_weight=config.loss_objectness_weight,
        one_to_many_weight=config.loss_one_to_many_weight,
        **shared,
    )


def _location_criterion(config: HfMaskFormerConfig) -> LocationCriterion:
    return LocationCriterion(
        num_labels=config.num_labels,
        thing_label_ids=config.thing_label_ids or (),
        class_weight=config.loss_class_weight,
        box_weight=config.loss_box_weight,
        giou_weight=config.loss_giou_weight,
        dice_weight=config.loss_dice_weight,
        focal_alpha=config.loss_focal_alpha,
        focal_gamma=config.loss_focal_gamma,
        class_cost=config.matcher_class_cost,
        box_cost=config.matcher_box_cost,
        giou_cost=config.matcher_giou_cost,
        dice_cost=config.matcher_dice_cost,
        most_per_target=config.criterion_queries_per_target,
    )


def _fields(config: HfMaskFormerConfig, part: str, *names: str) -> dict[str, Any]:
    """The fields `part_name` of the configuration by their names within the part."""
    return {name: getattr(config, f"{part}_{name}") for name in names}
