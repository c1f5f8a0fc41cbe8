"""Checkpoints of transformers' `maskformer` and `mask2former` <-> ours: configurations, weights, files.

The tables (`official_maskformer.py`, `official_mask2former.py`) relate names *in the files* (safetensors keys,
config.json fields); names in memory change between transformers versions. Files are opened by our own code and handed
on as a state dict, because transformers' key mappings are reversed on the next save, which would write our checkpoint
under foreign names.
"""

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .official_files import (
    HUB_ARGUMENTS,
    adapter_base,
    check_config_file,
    hub_arguments,
    no_safetensors,
    weight_files,
)
from .official_format import OfficialFormat
from .official_mask2former import MASK2FORMER
from .official_maskformer import MASKFORMER

logger = logging.get_logger(__name__)

FORMATS = {table.model_type: table for table in (MASKFORMER, MASK2FORMER)}
OUR_MODEL_TYPE = "hf_maskformer"
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# Fields that say the same in both.
SHARED_FIELDS = ("id2label", "label2id", "dtype", "torch_dtype", "num_labels")
# Fields that can be left out only at these values: another value would change the model.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "backbone_kwargs": (None, {}),
    "use_timm_backbone": (None, False),
    "use_pretrained_backbone": (None, False),
    "output_auxiliary_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True),
    "chunk_size_feed_forward": (None, 0),
}
# Fields without influence on the model: names, versions, and what the classes derive from their decoder.
WITHOUT_INFLUENCE = {
    *("_name_or_path", "architectures", "model_type", "transformers_version", "problem_type", "is_encoder_decoder"),
    *("num_hidden_layers", "hidden_size", "_commit_hash", "label_ids_to_fuse", "backbone_config", "decoder_config"),
}
# Sizes that two parts of ours have each, and the official model once.
STRUCTURAL = {"num_attention_heads"}

_BACKBONE = "model.pixel_level_module.encoder."
PLAIN_BACKBONE_NAMES = [(r"model\.pixel_level_module\.encoder\.", "model.backbone.body.")]
# Swin's output norms where the official format numbers them from 0; ours count stages from 1.
_NORM_FROM_ZERO = r"model\.pixel_level_module\.encoder\.hidden_states_norms\.(\d+)\."
# In official files, not in ours: buffers that are recomputed.
DROPPED = re.compile(r"criterion\.empty_weight|.*\.relative_position_index")
# Swin's last norm: never used where every stage has its own, and not present in every transformers version.
UNUSED_NORM = "backbone.body.swin.layernorm."


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def is_official_config(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json is transformers' own MaskFormer or Mask2Former."""
    return config_dict.get("model_type") in FORMATS


def translate_config(official: dict[str, Any]) -> dict[str, Any]:
    """Official config.json -> our fields; `task` stays at its default "panoptic": the official file does not store it.

    Raises:
        ValueError: A field that has no counterpart has a value that would change the model.
    """
    table = FORMATS[official["model_type"]]
    ours: dict[str, Any] = {"model_type": OUR_MODEL_TYPE, **table.parts, "image_size": [512, 512]}
    decoder = dict(official.get("decoder_config") or {})
    if decoder.get("model_type", "detr") not in ("detr", "maskformer_detr"):
        raise ValueError(f"decoder_config.model_type {decoder['model_type']!r} cannot be read; allowed is 'detr'.")
    ours["backbone_config"] = _translate_backbone(official.get("backbone_config") or table.default_backbone)
    for field, default in table.defaults.items():
        value = official.get(field, default)
        offset = table.offsets.get(field)
        ours.update(dict.fromkeys(table.fields[field], value if offset is None else value - offset))
    for field, default in table.decoder_defaults.items():
        ours.update(dict.fromkeys(table.decoder_fields[field], decoder.get(field, default)))
    ours.update({field: official[field] for field in SHARED_FIELDS if official.get(field) is not None})
    if ours.get("ignore_index", 255) in range(len(ours.get("id2label") or ()) or ours.get("num_labels", 2)):
        ours["ignore_index"] = None  # the official model never reads it, so it says nothing about a real label
    neutral = {**NEUTRAL_VALUES, **table.neutral_values}
    known = {*table.fields, *SHARED_FIELDS, *WITHOUT_INFLUENCE}
    if table.decoder_fields:  # derived from the decoder
        known.add("num_attention_heads")
    for field, value in official.items():
        if field not in known and value not in neutral.get(field, ()):
            raise ValueError(f"Official field {field!r} = {value!r} has no counterpart in HfMaskFormerConfig.")
    return ours


def _translate_backbone(backbone: dict[str, Any]) -> dict[str, Any]:
    backbone = dict(backbone)
    if backbone.get("model_type") in ("swin", "maskformer-swin"):
        backbone |= {"model_type": "swin", "out_features": STAGES}
        backbone.pop("out_indices", None)
    return backbone


def format_for(config: PreTrainedConfig) -> OfficialFormat:
    """The format whose decoder this configuration has; ValueError names what plain transformers lacks."""
    for table in FORMATS.values():
        if table.parts["query_decoder"] == config.query_decoder:
            return table
    allowed = " or ".join(repr(table.parts["query_decoder"]) for table in FORMATS.values())
    raise ValueError(f"save_official: query_decoder is {config.query_decoder!r}, transformers has only {allowed}.")


def untranslate_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Our configuration -> the official dictionary; ValueError names the part that plain transformers lacks."""
    table = format_for(config)
    for field, value in table.parts.items():
        if getattr(config, field) != value:
            raise ValueError(f"save_official: {field} is {getattr(config, field)!r}, transformers has only {value!r}.")
    if config.pixel_decoder_dim % 32:
        raise ValueError(
            f"save_official: pixel_decoder_dim is {config.pixel_decoder_dim}, transformers needs 32 groups."
        )
    backbone = config.backbone_config
    if backbone.model_type not in ("resnet", "swin"):
        raise ValueError(
            f"save_official: backbone {backbone.model_type!r}; transformers' {table.model_type} has resnet and swin."
        )
    lost = {field for field, value in table.training_only.items() if getattr(config, field) != value}
    for field, ours in {**table.fields, **table.decoder_fields}.items():
        values = {name: getattr(config, name) for name in ours}
        differing = {name for name, value in values.items() if value != values[ours[0]]}
        if differing and field in STRUCTURAL:
            raise ValueError(f"save_official: transformers has one {field} for {values}; make them equal.")
        lost |= differing
    if lost:
        logger.warning(
            f"save_official: {', '.join(sorted(lost))} matter in training only and have no place in official files."
        )
    official = {
        field: getattr(config, ours[0]) + table.offsets.get(field, 0)
        if field in table.offsets
        else getattr(config, ours[0])
        for field, ours in table.fields.items()
        if getattr(config, ours[0]) is not None  # an ignore_index of None is not known there
    }
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    official = {**official, **labels, "backbone_config": backbone.to_dict()}
    if table.decoder_fields:
        decoder = {field: getattr(config, ours[0]) for field, ours in table.decoder_fields.items()}
        official["decoder_config"] = {"model_type": "detr", **decoder}
    return official


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def rename_official_weights(weights: dict[str, Tensor], table: OfficialFormat, *, swin: bool) -> dict[str, Tensor]:
    """Official file names -> ours.

    Raises:
        ValueError: A name that no row of the tables knows.
    """
    renamed = {}
    for name, tensor in _split_attention(weights, table.joint_attention).items():
        if not DROPPED.fullmatch(name):
            renamed[_our_name(name, table, swin=swin)] = tensor
    return renamed


def _our_name(name: str, table: OfficialFormat, *, swin: bool) -> str:
    norm = re.match(_NORM_FROM_ZERO, name) if swin and table.counts_norms_from_zero else None
    if norm:
        return f"model.backbone.body.hidden_states_norms.stage{int(norm[1]) + 1}." + name[norm.end() :]
    for pattern, ours in _rows(table, swin=swin):
        renamed, count = re.subn("^" + pattern, ours, name)
        if count:
            return renamed
    raise ValueError(f"The official checkpoint has a weight {name!r} that no table of official.py knows.")


def _rows(table: OfficialFormat, *, swin: bool) -> list[tuple[str, str]]:
    return table.weight_names + ((table.swin_names if swin else []) or PLAIN_BACKBONE_NAMES)


def _split_attention(weights: dict[str, Tensor], joint: str | None) -> dict[str, Tensor]:
    """One matrix of query, key and value (torch's MultiheadAttention) as the three that other layers store."""
    split = {}
    for name, tensor in weights.items():
        found = re.fullmatch(joint, name) if joint else None
        if found is None:
            split[name] = tensor
        else:
            split |= {
                f"{found[1]}{part}_proj.{found[2]}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)
            }
    return split


def _join_attention(weights: dict[str, Tensor], joint: str | None) -> dict[str, Tensor]:
    """The inverse of `_split_attention`."""
    if joint is None:
        return weights
    joined = {}
    for name, tensor in weights.items():
        query = re.fullmatch(r"(.*\.)q_proj\.(weight|bias)", name)
        if query and re.fullmatch(joint, f"{query[1]}in_proj_{query[2]}"):
            parts = [weights[f"{query[1]}{part}_proj.{query[2]}"] for part in "qkv"]
            joined[f"{query[1]}in_proj_{query[2]}"] = torch.cat(parts)
        elif not re.fullmatch(joint, re.sub(r"[kv]_proj\.", "in_proj_", name)):
            joined[name] = tensor
    return joined


def _reverse(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn (official pattern, our template) into (our pattern, official template); each has at most one group."""
    reversed_rows = []
    for pattern, ours in rows:
        group = re.search(r"\([^)]*\)", pattern)
        our_pattern = re.escape(ours).replace(r"\\1", group[0] if group else "")
        official = pattern.replace(group[0], r"\1") if group else pattern
        reversed_rows.append((our_pattern, official.replace(r"\.", ".")))
    return reversed_rows


def rename_our_weights(weights: dict[str, Tensor], table: OfficialFormat, *, swin: bool) -> dict[str, Tensor]:
    """Our file names -> official ones; the training-only per-pixel classifier is left out."""
    rows = _reverse(_rows(table, swin=swin))
    renamed = {}
    for name, tensor in weights.items():
        norm = re.match(r"model\.backbone\.body\.hidden_states_norms\.stage(\d+)\.", name)
        if name.startswith("pixel_classifier."):
            continue
        if swin and norm and table.counts_norms_from_zero:
            renamed[f"{_BACKBONE}hidden_states_norms.{int(norm[1]) - 1}." + name[norm.end() :]] = tensor
            continue
        for pattern, official in rows:
            new_name, count = re.subn("^" + pattern, official, name)
            if count:
                renamed[new_name] = tensor
                break
        else:
            raise ValueError(f"save_official: the weight {name!r} has no official name.")
    return _join_attention(renamed, table.joint_attention)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def official_source(source: str | Path, **kwargs: Any) -> dict[str, Any] | None:
    """The official config dictionary of a directory or Hub id; None for one of ours. An adapter is what its base is.

    Raises:
        ValueError: Another model type, no config.json in a directory, or weights that exist only as a pickle.
    """
    hub, variant = hub_arguments(kwargs), kwargs.get("variant")
    source = adapter_base(source, hub)
    check_config_file(source, hub.get("subfolder", ""))
    config_dict, _ = PreTrainedConfig.get_config_dict(source, **hub)
    model_type = config_dict.get("model_type")
    if model_type not in (*FORMATS, OUR_MODEL_TYPE):
        raise ValueError(
            f"{source} holds a {model_type!r} model; hf_maskformer reads {OUR_MODEL_TYPE!r} and official "
            f"{', '.join(map(repr, FORMATS))} checkpoints."
        )
    if weight_files(source, hub, variant) is None:
        raise ValueError(no_safetensors(source, hub, variant))
    return config_dict if model_type in FORMATS else None


def load_official(
    cls: Any, source: str | Path, config_dict: dict[str, Any], *, config: Any = None, **kwargs: Any
) -> Any:
    """Build `cls` from an official checkpoint; keyword overrides of configuration fields are honoured.

    `config` may be all that transformers allows: a path or Hub id, or an object, ours or an official one.
    """
    hub, variant = hub_arguments(kwargs), kwargs.get("variant")
    kwargs = {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, "variant")}
    adapter_name = kwargs.pop("adapter_name", "default")
    base = adapter_base(source, hub)
    config, kwargs = _our_config(cls.config_class, config_dict if config is None else config, hub, kwargs)
    weights: dict[str, Tensor] = {}
    for file in weight_files(base, hub, variant) or ():
        weights.update(load_file(file))
    swin = config.backbone_config.model_type == "swin"
    renamed = rename_official_weights(weights, FORMATS[config_dict["model_type"]], swin=swin)
    with torch.device("meta"):
        unused_norm = {name: value.shape for name, value in cls(config).state_dict().items() if UNUSED_NORM in name}
    if not unused_norm:
        renamed = {name: tensor for name, tensor in renamed.items() if UNUSED_NORM not in name}
    for name, shape in unused_norm.items():  # not in every file, and nothing depends on it
        full_name = name if name.startswith("model.") else f"model.{name}"
        renamed.setdefault(full_name, torch.ones(shape) if name.endswith("weight") else torch.zeros(shape))
    if cls.base_model_prefix and not hasattr(cls, "loss_normalizer"):  # the base model's names have no prefix
        renamed = {name.removeprefix("model."): tensor for name, tensor in renamed.items()}
    loaded = cls.from_pretrained(None, config=config, state_dict=renamed, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with its loading info
    model.name_or_path = model.config.name_or_path = str(base)  # where an adapter trained on it looks for its base
    if base != source:
        model.load_adapter(str(source), adapter_name=adapter_name, adapter_kwargs=dict(hub))
    return loaded


def _our_config(our_class: Any, given: Any, hub: dict[str, Any], overrides: dict[str, Any]) -> tuple[Any, Any]:
    """A configuration of ours from any form of one, and the keywords that are none of its fields."""
    if isinstance(given, (str, Path)):
        return our_class.from_pretrained(given, return_unused_kwargs=True, **hub, **overrides)
    if getattr(given, "model_type", None) == OUR_MODEL_TYPE:
        return copy.deepcopy(given), overrides
    if getattr(given, "model_type", None) in FORMATS:
        given = given.to_dict()
    elif not (isinstance(given, dict) and is_official_config(given)):
        raise ValueError(
            f"config must be a path, a Hub id, an HfMaskFormerConfig or an official {' or '.join(FORMATS)} "
            f"configuration, got {given!r:.60}."
        )
    return our_class.from_dict(given, return_unused_kwargs=True, **overrides)


def save_official(model: Any, save_directory: str | Path, *, image_processor: Any = None) -> None:
    """Write config.json, model.safetensors and, given a processor, preprocessor_config.json, in transformers' form."""
    if not hasattr(model, "loss_normalizer"):
        raise ValueError("save_official needs HfMaskFormerForUniversalSegmentation, the model with its heads.")
    official_config, table = untranslate_config(model.config), format_for(model.config)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # names in files differ from names in memory
        model.save_pretrained(scratch, max_shard_size="1000GB")
        weights = load_file(Path(scratch) / SAFE_WEIGHTS_NAME)
    renamed = rename_our_weights(weights, table, swin=model.config.backbone_config.model_type == "swin")
    class_weight = torch.ones(model.config.num_labels + 1)
    class_weight[-1] = model.config.loss_no_object_weight
    renamed["criterion.empty_weight"] = class_weight
    if model.config.backbone_config.model_type == "swin":
        width = model.model.backbone.channels[-1]
        renamed.setdefault(f"{table.last_norm}weight", torch.ones(width))
        renamed.setdefault(f"{table.last_norm}bias", torch.zeros(width))
        tables = {name: tensor for name, tensor in renamed.items() if name.endswith("relative_position_bias_table")}
        for name, biases in tables.items():
            renamed[name.replace("bias_table", "index")] = relative_position_index(biases)
    save_file(
        {name: tensor.contiguous() for name, tensor in renamed.items()}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"}
    )
    exported = table.config_class(**official_config)
    exported.architectures = [table.architecture]
    exported.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_official(folder, table.image_processor)


def relative_position_index(table: Tensor) -> Tensor:
    """Row of Swin's bias table that each pair of window cells reads: (w*w, w*w) int64 for a table of (2w-1)^2 rows."""
    window = (round(len(table) ** 0.5) + 1) // 2
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w*w, 2) row and column
    offsets = cells[:, None] - cells[None, :] + window - 1  # (w*w, w*w, 2), each in 0..2w-2
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
