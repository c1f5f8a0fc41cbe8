"""Names of transformers' `maskformer` checkpoints <-> ours: configuration fields and weights, as tables.

The tables relate names *in the files* (safetensors keys, config.json fields); names in memory change between
transformers versions. Files are opened by our own code and handed on as a state dict, because transformers' key
mappings are reversed on the next save, which would write our checkpoint under foreign names.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MaskFormerConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file, logging

logger = logging.get_logger(__name__)

OFFICIAL_MODEL_TYPES = ("maskformer",)
OUR_MODEL_TYPE = "hf_maskformer"
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# official field -> our fields
CONFIG_FIELDS = {
    "fpn_feature_size": ("pixel_decoder_dim",),
    "mask_feature_size": ("mask_dim",),
    "no_object_weight": ("loss_no_object_weight",),
    "cross_entropy_weight": ("loss_class_weight",),
    "mask_weight": ("loss_mask_weight", "matcher_mask_cost"),
    "dice_weight": ("loss_dice_weight", "matcher_dice_cost"),
    "use_auxiliary_loss": ("loss_auxiliary",),
    "init_std": ("init_std",),
}
DECODER_FIELDS = {
    "d_model": ("query_decoder_dim",),
    "decoder_layers": ("query_decoder_layers",),
    "decoder_attention_heads": ("query_decoder_heads",),
    "decoder_ffn_dim": ("query_decoder_ffn_dim",),
    "dropout": ("query_decoder_dropout",),
    "attention_dropout": ("query_decoder_attention_dropout",),
    "activation_dropout": ("query_decoder_activation_dropout",),
    "activation_function": ("query_decoder_activation",),
    "num_queries": ("num_queries",),
}
# Fields that say the same in both.
SHARED_FIELDS = ("id2label", "label2id", "dtype", "torch_dtype", "num_labels")
# Fields that can be left out only at these values: another value would change the model.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "backbone": (None,),
    "backbone_kwargs": (None, {}),
    "use_timm_backbone": (None, False),
    "use_pretrained_backbone": (None, False),
    "output_auxiliary_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True),
    "chunk_size_feed_forward": (None, 0),
    "init_xavier_std": (1, 1.0),
}
# Fields without influence on the model: names, versions, and what MaskFormerConfig derives from its decoder.
WITHOUT_INFLUENCE = {
    *("_name_or_path", "architectures", "model_type", "transformers_version", "problem_type", "is_encoder_decoder"),
    *("num_attention_heads", "num_hidden_layers", "hidden_size", "_commit_hash", "label_ids_to_fuse"),
}
OFFICIAL_DEFAULTS: dict[str, Any] = {
    **{"fpn_feature_size": 256, "mask_feature_size": 256, "no_object_weight": 0.1, "cross_entropy_weight": 1.0},
    **{"mask_weight": 20.0, "dice_weight": 1.0, "use_auxiliary_loss": False, "init_std": 0.02},
}
OFFICIAL_DECODER_DEFAULTS: dict[str, Any] = {
    **{"d_model": 256, "decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "dropout": 0.1},
    **{"attention_dropout": 0.0, "activation_dropout": 0.0, "activation_function": "relu", "num_queries": 100},
}

_BACKBONE = "model.pixel_level_module.encoder."
_LAYER = r"model\.transformer_module\.decoder\.layers\.(\d+)\."
# (pattern of the official name, ours). The first match counts; the reverse direction is derived, see `_reverse`.
WEIGHT_NAMES = [
    (r"model\.pixel_level_module\.decoder\.fpn\.stem\.0\.", "model.pixel_decoder.stem.conv."),
    (r"model\.pixel_level_module\.decoder\.fpn\.stem\.1\.", "model.pixel_decoder.stem.norm."),
    (r"model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.proj\.0\.", r"model.pixel_decoder.laterals.\1.conv."),
    (r"model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.proj\.1\.", r"model.pixel_decoder.laterals.\1.norm."),
    (r"model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.block\.0\.", r"model.pixel_decoder.outputs.\1.conv."),
    (r"model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.block\.1\.", r"model.pixel_decoder.outputs.\1.norm."),
    (r"model\.pixel_level_module\.decoder\.mask_projection\.", "model.pixel_decoder.mask_projection."),
    (r"model\.transformer_module\.queries_embedder\.", "model.query_decoder.query_positions."),
    (r"model\.transformer_module\.input_projection\.", "model.query_decoder.input_projection."),
    (r"model\.transformer_module\.decoder\.layernorm\.", "model.query_decoder.norm."),
    (_LAYER + r"self_attn\.q_proj\.", r"model.query_decoder.layers.\1.self_attention.query."),
    (_LAYER + r"self_attn\.k_proj\.", r"model.query_decoder.layers.\1.self_attention.key."),
    (_LAYER + r"self_attn\.v_proj\.", r"model.query_decoder.layers.\1.self_attention.value."),
    (_LAYER + r"self_attn\.out_proj\.", r"model.query_decoder.layers.\1.self_attention.output."),
    (_LAYER + r"self_attn_layer_norm\.", r"model.query_decoder.layers.\1.self_attention_norm."),
    (_LAYER + r"encoder_attn\.q_proj\.", r"model.query_decoder.layers.\1.cross_attention.query."),
    (_LAYER + r"encoder_attn\.k_proj\.", r"model.query_decoder.layers.\1.cross_attention.key."),
    (_LAYER + r"encoder_attn\.v_proj\.", r"model.query_decoder.layers.\1.cross_attention.value."),
    (_LAYER + r"encoder_attn\.out_proj\.", r"model.query_decoder.layers.\1.cross_attention.output."),
    (_LAYER + r"encoder_attn_layer_norm\.", r"model.query_decoder.layers.\1.cross_attention_norm."),
    (_LAYER + r"fc1\.", r"model.query_decoder.layers.\1.feed_forward.expand."),
    (_LAYER + r"fc2\.", r"model.query_decoder.layers.\1.feed_forward.contract."),
    (_LAYER + r"final_layer_norm\.", r"model.query_decoder.layers.\1.feed_forward_norm."),
    (r"class_predictor\.", "model.class_head.projection."),
    (r"mask_embedder\.(\d+)\.0\.", r"model.mask_head.embedding.layers.\1."),
]
# Swin inside MaskFormer wraps the model in `model.` and numbers its output norms from 0; ours count stages from 1.
_SWIN_NORM = r"model\.pixel_level_module\.encoder\.hidden_states_norms\.(\d+)\."
SWIN_NAMES = [
    (r"model\.pixel_level_module\.encoder\.model\.(embeddings|encoder)\.", r"model.backbone.body.\1."),
    (r"model\.pixel_level_module\.encoder\.model\.layernorm\.", "model.backbone.body.swin.layernorm."),
]
PLAIN_BACKBONE_NAMES = [(r"model\.pixel_level_module\.encoder\.", "model.backbone.body.")]
# In official files, not in ours: buffers that are recomputed.
DROPPED = re.compile(r"criterion\.empty_weight|.*\.relative_position_index")
# Swin's last norm: never used where every stage has its own, and not present in every transformers version.
UNUSED_NORM = "backbone.body.swin.layernorm."


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def is_official_config(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json is transformers' own MaskFormer."""
    return config_dict.get("model_type") in OFFICIAL_MODEL_TYPES


def translate_config(official: dict[str, Any]) -> dict[str, Any]:
    """Official config.json -> our fields; `task` stays at its default "panoptic": the official file does not store it.

    Raises:
        ValueError: A field that has no counterpart has a value that would change the model.
    """
    ours: dict[str, Any] = {"model_type": OUR_MODEL_TYPE, "pixel_decoder": "fpn", "image_size": [512, 512]}
    decoder = dict(official.get("decoder_config") or {})
    if decoder.get("model_type", "detr") not in ("detr", "maskformer_detr"):
        raise ValueError(f"decoder_config.model_type {decoder['model_type']!r} cannot be read; allowed is 'detr'.")
    ours["backbone_config"] = _translate_backbone(official.get("backbone_config"))
    for field, default in OFFICIAL_DEFAULTS.items():
        ours.update(dict.fromkeys(CONFIG_FIELDS[field], official.get(field, default)))
    for field, default in OFFICIAL_DECODER_DEFAULTS.items():
        ours.update(dict.fromkeys(DECODER_FIELDS[field], decoder.get(field, default)))
    ours.update({field: official[field] for field in SHARED_FIELDS if official.get(field) is not None})
    known = {*CONFIG_FIELDS, *SHARED_FIELDS, *WITHOUT_INFLUENCE, "backbone_config", "decoder_config"}
    for field, value in official.items():
        if field in known or value in NEUTRAL_VALUES.get(field, ()):
            continue
        raise ValueError(f"Official field {field!r} = {value!r} has no counterpart in HfMaskFormerConfig.")
    return ours


def _translate_backbone(backbone: dict[str, Any] | None) -> dict[str, Any]:
    if backbone is None:  # MaskFormerConfig's default: Swin-B
        backbone = {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
        backbone |= {"window_size": 12, "image_size": 384, "drop_path_rate": 0.3}
    backbone = dict(backbone)
    if backbone.get("model_type") in ("swin", "maskformer-swin"):
        backbone |= {"model_type": "swin", "out_features": STAGES}
        backbone.pop("out_indices", None)
    return backbone


def untranslate_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Our configuration -> the official dictionary; ValueError names the part that plain transformers lacks."""
    required = {
        **{"pixel_decoder": "fpn", "query_decoder": "standard", "mask_head": "dot_product", "class_head": "linear"},
        **{"mask_head_layers": 3, "class_activation": "softmax", "query_decoder_memory_stride": 32},
    }
    for field, value in required.items():
        if getattr(config, field) != value:
            raise ValueError(f"save_official: {field} is {getattr(config, field)!r}, transformers has only {value!r}.")
    if config.pixel_decoder_dim % 32:
        raise ValueError(
            f"save_official: pixel_decoder_dim is {config.pixel_decoder_dim}, transformers needs 32 groups."
        )
    backbone = config.backbone_config
    if backbone.model_type not in ("resnet", "swin"):
        raise ValueError(
            f"save_official: backbone {backbone.model_type!r}; transformers' MaskFormer has resnet and swin."
        )
    published = {
        "criterion_resolution": "target",
        "loss_pixel_weight": 0,
        "matcher": "hungarian",
        "matcher_layers": "each",
    }
    lost = sorted(field for field, value in published.items() if getattr(config, field) != value)
    if lost:
        logger.warning(
            f"save_official: {', '.join(lost)} matter in training only and have no place in official files."
        )
    official = {field: getattr(config, ours[0]) for field, ours in CONFIG_FIELDS.items()}
    decoder = {field: getattr(config, ours[0]) for field, ours in DECODER_FIELDS.items()}
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    return {
        **official,
        **labels,
        "backbone_config": backbone.to_dict(),
        "decoder_config": {"model_type": "detr", **decoder},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def rename_official_weights(weights: dict[str, Tensor], *, swin: bool) -> dict[str, Tensor]:
    """Official file names -> ours.

    Raises:
        ValueError: A name that no row of the tables knows.
    """
    renamed = {}
    for name, tensor in weights.items():
        if DROPPED.fullmatch(name):
            continue
        renamed[_our_name(name, swin=swin)] = tensor
    return renamed


def _our_name(name: str, *, swin: bool) -> str:
    norm = re.match(_SWIN_NORM, name)
    if swin and norm:
        return f"model.backbone.body.hidden_states_norms.stage{int(norm[1]) + 1}." + name[norm.end() :]
    rows = WEIGHT_NAMES + (SWIN_NAMES if swin else PLAIN_BACKBONE_NAMES)
    for pattern, ours in rows:
        renamed, count = re.subn("^" + pattern, ours, name)
        if count:
            return renamed
    raise ValueError(f"The official checkpoint has a weight {name!r} that no table of official.py knows.")


def _reverse(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn (official pattern, our template) into (our pattern, official template); each has at most one group."""
    reversed_rows = []
    for pattern, ours in rows:
        group = re.search(r"\([^)]*\)", pattern)
        our_pattern = re.escape(ours).replace(r"\\1", group[0] if group else "")
        official = pattern.replace(group[0], r"\1") if group else pattern
        reversed_rows.append((our_pattern, official.replace(r"\.", ".")))
    return reversed_rows


def rename_our_weights(weights: dict[str, Tensor], *, swin: bool) -> dict[str, Tensor]:
    """Our file names -> official ones; the training-only per-pixel classifier is left out."""
    rows = _reverse(WEIGHT_NAMES + (SWIN_NAMES if swin else PLAIN_BACKBONE_NAMES))
    renamed = {}
    for name, tensor in weights.items():
        norm = re.match(r"model\.backbone\.body\.hidden_states_norms\.stage(\d+)\.", name)
        if name.startswith("pixel_classifier."):
            continue
        if swin and norm:
            renamed[f"{_BACKBONE}hidden_states_norms.{int(norm[1]) - 1}." + name[norm.end() :]] = tensor
            continue
        for pattern, official in rows:
            new_name, count = re.subn("^" + pattern, official, name)
            if count:
                renamed[new_name] = tensor
                break
        else:
            raise ValueError(f"save_official: the weight {name!r} has no official name.")
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def official_source(source: str | Path, **kwargs: Any) -> dict[str, Any] | None:
    """The official config dictionary of a directory or Hub id; None for one of ours.

    Raises:
        ValueError: Another model type, no config.json in a directory, or weights that exist only as a pickle.
    """
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; it holds {sorted(entry.name for entry in folder.iterdir())[:10]}."
        )
    config_dict, _ = PreTrainedConfig.get_config_dict(source, **hub)
    model_type = config_dict.get("model_type")
    if model_type not in (*OFFICIAL_MODEL_TYPES, OUR_MODEL_TYPE):
        raise ValueError(
            f"{source} holds a {model_type!r} model; hf_maskformer reads {OUR_MODEL_TYPE!r} and official "
            f"{', '.join(map(repr, OFFICIAL_MODEL_TYPES))} checkpoints."
        )
    if _weight_files(source, hub) is None:
        raise ValueError(_no_safetensors(source, hub))
    return config_dict if model_type in OFFICIAL_MODEL_TYPES else None


def _weight_files(source: str | Path, hub: dict[str, Any]) -> list[str] | None:
    quiet = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **hub, **quiet)
    if single is not None:
        return [single]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)
    if index is None:
        return None
    shards = sorted(set(PreTrainedConfig._dict_from_json_file(index)["weight_map"].values()))
    return [cached_file(source, shard, **hub) for shard in shards]


def _no_safetensors(source: str | Path, hub: dict[str, Any]) -> str:
    pickled = cached_file(source, WEIGHTS_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if pickled is None:
        return f"{source} has a config.json but no weights ({SAFE_WEIGHTS_NAME})."
    return (
        f"{source} has its weights only as a pickle ({WEIGHTS_NAME}), which can run code when it is opened and is "
        'never loaded. If you trust it, convert it once: python -c "import torch; '
        "from safetensors.torch import save_file; "
        f"save_file({{k: v.contiguous() for k, v in torch.load('{WEIGHTS_NAME}', weights_only=True).items()}}, "
        f"'{SAFE_WEIGHTS_NAME}', metadata={{'format': 'pt'}})\""
    )


def load_official(
    cls: Any, source: str | Path, config_dict: dict[str, Any], *, config: Any = None, **kwargs: Any
) -> Any:
    """Build `cls` from an official checkpoint; keyword overrides of configuration fields are honoured."""
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    if config is None:
        config, kwargs = cls.config_class.from_dict(config_dict, return_unused_kwargs=True, **kwargs)
    config.name_or_path = str(source)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(source, hub) or ():
        weights.update(load_file(file))
    renamed = rename_official_weights(weights, swin=config.backbone_config.model_type == "swin")
    with torch.device("meta"):
        has_unused_norm = any(UNUSED_NORM in name for name in cls(config).state_dict())
    if not has_unused_norm:
        renamed = {name: tensor for name, tensor in renamed.items() if UNUSED_NORM not in name}
    if cls.base_model_prefix and not hasattr(cls, "loss_normalizer"):  # the base model's names have no prefix
        renamed = {name.removeprefix("model."): tensor for name, tensor in renamed.items()}
    return cls.from_pretrained(None, config=config, state_dict=renamed, **kwargs)


def save_official(model: Any, save_directory: str | Path, *, image_processor: Any = None) -> None:
    """Write config.json, model.safetensors and, given a processor, preprocessor_config.json, in transformers' form."""
    if not hasattr(model, "loss_normalizer"):
        raise ValueError("save_official needs HfMaskFormerForUniversalSegmentation, the model with its heads.")
    official_config = untranslate_config(model.config)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # names in files differ from names in memory
        model.save_pretrained(scratch, max_shard_size="1000GB")
        weights = load_file(Path(scratch) / SAFE_WEIGHTS_NAME)
    renamed = rename_our_weights(weights, swin=model.config.backbone_config.model_type == "swin")
    class_weight = torch.ones(model.config.num_labels + 1)
    class_weight[-1] = model.config.loss_no_object_weight
    renamed["criterion.empty_weight"] = class_weight
    if model.config.backbone_config.model_type == "swin":
        width = model.model.backbone.channels[-1]
        renamed.setdefault(f"{_BACKBONE}model.layernorm.weight", torch.ones(width))
        renamed.setdefault(f"{_BACKBONE}model.layernorm.bias", torch.zeros(width))
        tables = {name: tensor for name, tensor in renamed.items() if name.endswith("relative_position_bias_table")}
        for name, table in tables.items():
            renamed[name.replace("bias_table", "index")] = relative_position_index(table)
    save_file(
        {name: tensor.contiguous() for name, tensor in renamed.items()}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"}
    )
    exported = MaskFormerConfig(**official_config)
    exported.architectures = ["MaskFormerForInstanceSegmentation"]
    exported.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_official(folder)


def relative_position_index(table: Tensor) -> Tensor:
    """Row of Swin's bias table that each pair of window cells reads: (w*w, w*w) int64 for a table of (2w-1)^2 rows."""
    window = (round(len(table) ** 0.5) + 1) // 2
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w*w, 2) row and column
    offsets = cells[:, None] - cells[None, :] + window - 1  # (w*w, w*w, 2), each in 0..2w-2
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
