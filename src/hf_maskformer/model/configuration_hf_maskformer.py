"""Configuration of every member of the MaskFormer family: flat fields, prefixed by the part they belong to.

A part is chosen by name (a ``Literal``) and sized by the fields that carry its prefix; only
``modeling_hf_maskformer.py`` turns this configuration into modules. Defaults are MaskFormer's (Cheng et al., NeurIPS
2021, https://arxiv.org/abs/2107.06278).
"""

import difflib
from os import PathLike
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import logging

from .consistency import check_consistency
from .label_spec import default_thing_label_ids, label_table
from .official import is_official_config, translate_config

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1  # of config.json: raised when a field changes its meaning

AUTO_MAP = {
    "AutoConfig": "configuration_hf_maskformer.HfMaskFormerConfig",
    "AutoModel": "modeling_hf_maskformer.HfMaskFormerModel",
    "AutoModelForUniversalSegmentation": "modeling_hf_maskformer.HfMaskFormerForUniversalSegmentation",
    "AutoModelForImageSegmentation": "modeling_hf_maskformer.HfMaskFormerForUniversalSegmentation",
    "AutoImageProcessor": "image_processing_hf_maskformer.HfMaskFormerImageProcessor",
}

# Keywords that PreTrainedConfig consumes itself although they are no dataclass fields.
_INHERITED_KEYWORDS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "transformers_version",
}

# Keywords of `from_pretrained` that concern the way of loading, not the configuration.
_LOADING_KEYWORDS = ("_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "trust_remote_code")
# The same of models, for which they are handed back: `pipeline` and `AutoModel` give them to the configuration first.
_MODEL_LOADING_KEYWORDS = (
    *("adapter_name", "allow_all_kernels", "device_map", "device_mesh", "disable_mmap", "distributed_config"),
    *("fusion_config", "ignore_mismatched_sizes", "kernel_config", "key_mapping", "low_cpu_mem_usage", "max_memory"),
    *("mirror", "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info"),
    *("quantization_config", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "use_safetensors", "variant"),
    "weights_only",
)

# Four feature maps at strides 4, 8, 16, 32 of MaskFormer's own ResNet-50.
_DEFAULT_BACKBONE = {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]}


@strict
class HfMaskFormerConfig(PreTrainedConfig):
    r"""
    Configuration of [`HfMaskFormerModel`] and [`HfMaskFormerForUniversalSegmentation`].

    Args:
        backbone_config: A transformers backbone configuration (object or dict with `model_type`). Default: ResNet-50.
        backbone: `"timm/<name>"` instead of `backbone_config`; random weights, no network access.
        backbone_freeze_batch_norm: Keep batch norms of the backbone at their stored statistics and affine values.
        backbone_neck: `"pyramid"` makes four maps (strides 4 to 32) of a backbone with one stride (plain ViT);
            `"auto"` does so only where the measured strides ask for it; `"none"` refuses such a backbone.
        num_channels: Channels of `pixel_values`.
        spatial_dims: 2 for images (volumes, 3, come with their own parts).
        image_size: Height and width of the canvas that the image processor pads to.
        pixel_decoder: `"fpn"`; `"fpn_transformer"` (a transformer encoder on the coarsest map, MaskFormer's panoptic
            models, official code `TransformerEncoderPixelDecoder`); `"deformable"` (Mask2Former: multi-scale
            deformable attention over strides 8, 16, 32, then one pyramid step); `"deformable_memory"` (Panoptic
            SegFormer: strides 8 to 64, and no per-pixel embedding); `"light"` (for real time: a transformer encoder
            on the coarsest map, then a pyramid of depthwise-separable convolutions with batch norms).
        pixel_decoder_layers: Encoder layers of `"fpn_transformer"`, `"deformable"` and `"light"`.
        pixel_decoder_points: Points that a head of deformable attention reads in each map.
        query_decoder: `"standard"`: DETR's decoder, post-norm, learned queries (sec. 3.3). `"anchored"`: things start
            from the pixels that look most like the middle of an object, each class of stuff from a learned query.
            `"masked"`: Mask2Former's, which looks within the mask that the layer before predicted. `"location"`:
            Panoptic SegFormer's, with heads of its own; things by boxes, one query for each class of stuff.
        query_decoder_*_mask_layers: Layers of the mask decoders of `"location"`; `query_decoder_layers` are those of
            its location decoder.
        query_decoder_memory_stride: Which map the queries attend to; 32, the coarsest, is published.
        query_decoder_memory_strides: Of `"masked"`: which maps its layers attend to, in turn; 32, 16, 8 is published.
        num_queries: N, the number of predicted masks.
        mask_head: `"dot_product"`: an MLP of each query, multiplied with the per-pixel embedding;
            `"located_dot_product"` adds fixed codes of the pixel's place; `"anchored_dot_product"` adds a paraboloid
            around the query's anchor; `"none"` for a query decoder that has its own.
        class_head: `"linear"`: one linear layer to K + 1 logits, the last one "no object"; or `"none"`.
        class_activation: How class logits become probabilities.
        criterion: `"dense"`: losses of whole masks, with the focal loss (MaskFormer); `"points"`: matching and losses
            on sampled points, with the binary cross-entropy (Mask2Former, sec. 3.3.2); `"location"`: boxes, sigmoid
            classes and dice (Panoptic SegFormer, sec. 3.4).
        criterion_queries_per_target: Queries of a target that go on to the mask decoder in training (`"location"`).
        criterion_points: Points of `"points"`, for matching and for the loss of each mask.
        criterion_oversample_ratio: Candidates for a loss point; the least certain ones are taken.
        criterion_importance_ratio: Part of the loss points that are chosen so; the others are uniform.
        criterion_resolution: Of `"dense"`: at the size of the `"target"` (published), or of the `"prediction"`, to
            which targets are averaged down: 16 times fewer pixels.
        loss_*_weight: Weights of the terms (as published: MaskFormer class CE 1, focal 20, dice 1; Mask2Former 2, 5
            (cross-entropy), 5).
        loss_auxiliary: Supervise every decoder layer.
        loss_pixel_weight: Weight of an auxiliary per-pixel cross-entropy on the per-pixel embedding; its classifier is
            used in training only. 0 (published) leaves it out.
        loss_objectness_weight: Weight of the loss on the map that anchors are picked from (`"anchored"` only).
        loss_one_to_many_weight: Weight of the mask losses of all queries anchored in a thing (`"anchored"` only).
        matcher: `"hungarian"`, `"fixed"` (query k predicts class k; semantic only; MaskFormer, Table 4) or `"located"`
            (a thing goes to a query anchored in it, stuff to the query of its class; needs `"anchored"`).
        matcher_layers: `"each"` decoder layer is matched (published), or the `"last"` for all (kMaX-DeepLab, sec. 3).
        matcher_location_cost: Of a pair that `"located"` should not make (FastInst: 1000).
        matcher_*_cost: Weights in the matching cost.
        initialization: Initial weights of all but the backbone: the published code's, or those of torch's modules.
        task, thing_label_ids, threshold, mask_threshold, overlap_mask_area_threshold,
        stuff_overlap_mask_area_threshold (of stuff in mask-wise merging; None: the same), panoptic_merge: What
            post-processing does by default; the same values stand in `preprocessor_config.json`.

    Raises:
        ValueError: For a keyword that is no field (the nearest is named) and for fields that contradict each other.
        huggingface_hub.errors.StrictDataclassFieldValidationError: For a value of the wrong type or an unknown part.
    """

    model_type = "hf_maskformer"

    backbone_config: dict | PreTrainedConfig | None = None
    backbone: str | None = None
    backbone_freeze_batch_norm: bool = False
    backbone_neck: Literal["auto", "pyramid", "none"] = "auto"
    num_channels: int = 3
    spatial_dims: int = 2
    image_size: list[int] | tuple[int, ...] = (512, 512)

    pixel_decoder: Literal["fpn", "fpn_transformer", "deformable", "deformable_memory", "light"] = "fpn"
    pixel_decoder_dim: int = 256
    pixel_decoder_layers: int = 6
    pixel_decoder_heads: int = 8
    pixel_decoder_ffn_dim: int = 2048
    pixel_decoder_dropout: float | int = 0.1
    pixel_decoder_points: int = 4
    mask_dim: int = 256

    query_decoder: Literal["standard", "anchored", "masked", "location"] = "standard"
    query_decoder_layers: int = 6
    query_decoder_dim: int = 256
    query_decoder_heads: int = 8
    query_decoder_ffn_dim: int = 2048
    query_decoder_dropout: float | int = 0.1
    query_decoder_attention_dropout: float | int = 0.1
    query_decoder_activation_dropout: float | int = 0.1
    query_decoder_activation: Literal["relu", "gelu"] = "relu"
    query_decoder_memory_stride: Literal[8, 16, 32] = 32
    query_decoder_memory_strides: list[int] | tuple[int, ...] = (32, 16, 8)
    query_decoder_points: int = 4
    query_decoder_thing_mask_layers: int = 4
    query_decoder_stuff_mask_layers: int = 6
    num_queries: int = 100

    mask_head: Literal["dot_product", "located_dot_product", "anchored_dot_product", "none"] = "dot_product"
    mask_head_layers: int = 3
    class_head: Literal["linear", "none"] = "linear"
    class_activation: Literal["softmax", "sigmoid"] = "softmax"

    criterion: Literal["dense", "points", "location"] = "dense"
    criterion_resolution: Literal["target", "prediction"] = "target"
    criterion_points: int = 12544
    criterion_oversample_ratio: float | int = 3.0
    criterion_importance_ratio: float | int = 0.75
    criterion_queries_per_target: int = 3
    loss_class_weight: float | int = 1.0
    loss_mask_weight: float | int = 20.0
    loss_dice_weight: float | int = 1.0
    loss_box_weight: float | int = 5.0
    loss_giou_weight: float | int = 2.0
    loss_pixel_weight: float | int = 0.0
    loss_objectness_weight: float | int = 1.0
    loss_one_to_many_weight: float | int = 0.0
    loss_no_object_weight: float | int = 0.1
    loss_focal_alpha: float | int = 0.25
    loss_focal_gamma: float | int = 2.0
    loss_auxiliary: bool = True
    matcher: Literal["hungarian", "fixed", "located"] = "hungarian"
    matcher_layers: Literal["each", "last"] = "each"
    matcher_class_cost: float | int = 1.0
    matcher_mask_cost: float | int = 20.0
    matcher_dice_cost: float | int = 1.0
    matcher_box_cost: float | int = 5.0
    matcher_giou_cost: float | int = 2.0
    matcher_location_cost: float | int = 1000.0

    task: Literal["semantic", "instance", "panoptic"] = "panoptic"
    thing_label_ids: list[int] | tuple[int, ...] | None = None
    ignore_index: int | None = 255
    threshold: float | int = 0.5
    mask_threshold: float | int = 0.5
    overlap_mask_area_threshold: float | int = 0.8
    stuff_overlap_mask_area_threshold: float | int | None = None
    panoptic_merge: Literal["argmax", "mask_wise"] = "argmax"

    initialization: Literal["published", "torch"] = "published"
    init_std: float | int = 0.02
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown_keywords(kwargs)
        if self.id2label is not None:
            label_table(self.id2label)  # what is no table is refused here; transformers makes the keys integers
        self.backbone_config = _build_backbone_config(self.backbone_config, self.backbone, self.num_channels)
        self.backbone = None  # one place holds the backbone: backbone_config
        self.image_size = [int(side) for side in self.image_size]
        self.query_decoder_memory_strides = [int(stride) for stride in self.query_decoder_memory_strides]
        super().__post_init__(**kwargs)
        if self.id2label is None:
            self.num_labels = 2
        self.label2id = {name: index for index, name in self.id2label.items()}
        self.thing_label_ids = self._resolved_thing_label_ids()
        self.validate_consistency()

    def _resolved_thing_label_ids(self) -> list[int]:
        if self.thing_label_ids is not None:
            return sorted({int(label_id) for label_id in self.thing_label_ids})
        return default_thing_label_ids(self.task, self.id2label) or []

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the `use_cache` that Trainer sets on every config and that is no field here."""
        values = super().to_dict()
        values.pop("use_cache", None)
        return values

    @classmethod
    def field_names(cls) -> set[str]:
        """Names of all fields that a keyword may set."""
        return set(cls.__dataclass_fields__)

    def _refuse_unknown_keywords(self, keywords: dict[str, Any]) -> None:
        unknown = sorted(set(keywords) - _INHERITED_KEYWORDS)
        if not unknown:
            return
        fields = sorted(name for name in self.field_names() if not name.startswith("_"))
        nearest = difflib.get_close_matches(unknown[0], fields, n=1, cutoff=0.0)
        raise ValueError(
            f"HfMaskFormerConfig has no field {unknown[0]!r} (given: {keywords[unknown[0]]!r}); the nearest field is "
            f"{nearest[0]!r}."
        )

    def validate_consistency(self) -> None:
        """Checks that span several fields; run at construction, on save and by the model's constructor."""
        check_consistency(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Merge keyword overrides *before* construction, so that every check sees the final values.

        Official `maskformer` dictionaries are translated field by field (`official.py`). `id2label` or `num_labels`
        given without `thing_label_ids` resets the latter, because the old ids speak of other classes; the table that
        is stored changes nothing.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        config_dict = dict(config_dict)
        if is_official_config(config_dict):
            config_dict = translate_config(config_dict)
        written_by = config_dict.get("format_version", FORMAT_VERSION)
        if written_by > FORMAT_VERSION:
            raise ValueError(
                f"This configuration has format_version {written_by}; this release reads up to {FORMAT_VERSION}. "
                "Update hf_maskformer."
            )
        known = cls.field_names() | _INHERITED_KEYWORDS
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in known and key != "auto_map"}
        stored = label_table(config_dict.get("id2label") or _generic_names(config_dict.get("num_labels") or 2))
        if "num_labels" in overrides and "id2label" not in overrides:
            if overrides["num_labels"] != len(stored):
                overrides["id2label"] = _generic_names(overrides["num_labels"])
            overrides.pop("num_labels")
        if overrides.get("id2label") is not None and label_table(overrides["id2label"]) == stored:
            overrides.pop("id2label")
        if "id2label" in overrides:
            config_dict.pop("label2id", None)
            config_dict.pop("num_labels", None)
            if "thing_label_ids" not in overrides and config_dict.pop("thing_label_ids", None):
                logger.warning("id2label was replaced without thing_label_ids: they are reset to the task's default.")
        old_name = overrides.pop("torch_dtype", None)
        if overrides.get("dtype") is None and old_name is not None:
            overrides["dtype"] = old_name  # else the file's own dtype would go before it
        if overrides.get("dtype") == "auto":
            overrides.pop("dtype")
        if isinstance(overrides.get("backbone_config"), dict) and "model_type" not in overrides["backbone_config"]:
            overrides["backbone_config"] = {
                **(config_dict.get("backbone_config") or {}),
                **overrides["backbone_config"],
            }
        config_dict.update(overrides)
        config = cls(**config_dict)
        for loading in _LOADING_KEYWORDS:
            kwargs.pop(loading, None)
        if return_unused_kwargs:
            return config, kwargs
        for loading in _MODEL_LOADING_KEYWORDS:
            kwargs.pop(loading, None)
        config._refuse_unknown_keywords(kwargs)
        return config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but an official file's `model_type` is no reason for a warning: it is translated."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if is_official_config(config_dict):
            config_dict = translate_config(config_dict)
        elif model_type is not None and model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {model_type!r} model; HfMaskFormer reads 'hf_maskformer' "
                "and official 'maskformer' checkpoints."
            )
        return config_dict, unused

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json with the whole `auto_map` (`register_for_auto_class` would keep a single class)."""
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _generic_names(count: int) -> dict[int, str]:
    """transformers' names of labels that have none."""
    return {index: f"LABEL_{index}" for index in range(count)}


def _build_backbone_config(backbone_config: Any, backbone: str | None, num_channels: int) -> PreTrainedConfig:
    """One backbone configuration object from either way of naming it; no network access."""
    if backbone is not None and backbone_config is not None:
        raise ValueError(f"Give backbone ({backbone!r}) or backbone_config, not both.")
    if backbone is not None:
        if not backbone.startswith("timm/"):
            raise ValueError(
                f"backbone must be 'timm/<name>', got {backbone!r}; a transformers backbone goes into backbone_config."
            )
        backbone_config = {
            "model_type": "timm_backbone",
            "backbone": backbone.removeprefix("timm/"),
            "num_channels": num_channels,
            "features_only": True,
            "out_indices": [-4, -3, -2, -1],  # strides 4 to 32, whether timm lists a stem (ResNet) or not (ConvNeXt)
        }
    if backbone_config is None:
        backbone_config = _DEFAULT_BACKBONE
    if isinstance(backbone_config, dict):
        fields = {"num_channels": num_channels, **backbone_config}
        model_type = fields.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"backbone_config has model_type {model_type!r}, which transformers does not know.")
        for derived in ("transformers_version", "stage_names"):
            fields.pop(derived, None)
        backbone_config = CONFIG_MAPPING[model_type](**fields)
    found = getattr(backbone_config, "num_channels", num_channels)
    if found != num_channels:
        raise ValueError(
            f"num_channels is {num_channels}, but backbone_config.num_channels is {found}; set both alike."
        )
    return _with_lists(backbone_config)


def _with_lists(config: PreTrainedConfig) -> PreTrainedConfig:
    """Tuples become lists, as a round trip through JSON makes them; some backbones' code accepts lists only."""
    for name, value in list(vars(config).items()):
        if isinstance(value, tuple) and not name.startswith("_"):
            setattr(config, name, list(value))
    return config


HfMaskFormerConfig.register_for_auto_class()

__all__ = ["AUTO_MAP", "HfMaskFormerConfig"]
