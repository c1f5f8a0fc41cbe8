"""preprocessor_config.json of transformers' MaskFormer and Mask2Former <-> settings of our image processor.

Field by field and without guessing: a field that has no counterpart here is accepted with its default value only.
"""

from collections.abc import Mapping
from typing import Any

OFFICIAL_TYPE_PREFIXES = ("MaskFormer", "Mask2Former")
# What these classes use where the file says nothing (ours differ in size).
OFFICIAL_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
IDENTITY_KEYS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
# Same name and meaning on both sides.
SHARED_KEYS = (
    "do_resize",
    "size_divisor",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
    "ignore_index",
    "do_reduce_labels",
    "disable_grouping",
)
# Written by older transformers versions.
RENAMED_KEYS = {"reduce_labels": "do_reduce_labels", "size_divisibility": "size_divisor"}
SIZE_KEYS = ("size", "max_size", "_max_size")
# No counterpart: (the values that mean the same as leaving the key out).
DEFAULT_ONLY = {
    "do_center_crop": (None, False),
    "crop_size": (None,),
    "do_convert_rgb": (None, True),
    "default_to_square": (None, False),
    "data_format": (None, "channels_first"),
    "input_data_format": (None,),
    "device": (None,),
    "return_tensors": (None,),
    "image_seq_length": (None,),
}
# Read by nothing in transformers' processors: the labels stand in the model's config.
IGNORED_KEYS = ("num_labels", "_valid_processor_keys", "_valid_kwargs_names", "_processor_class")


def is_official(fields: Mapping[str, Any]) -> bool:
    """True if the file was written by transformers' MaskFormer or Mask2Former processor, of any age.

    Raises:
        ValueError: it was written by the processor of another model.
    """
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if kind is None or kind.startswith("HfMaskFormer"):
        return False
    if kind.startswith(OFFICIAL_TYPE_PREFIXES):
        return True
    raise ValueError(f"image_processor_type is {kind!r}, allowed: HfMaskFormer*, MaskFormer* or Mask2Former*")


def from_official(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of an official file to keyword arguments of our processor."""
    fields = rename_old(fields)
    ours: dict[str, Any] = {"size": _size(fields), "task": "panoptic"}
    if not fields.get("do_reduce_labels"):  # with it transformers demands a value, and ours has one
        ours["ignore_index"] = None  # what these classes have where the file says nothing: 255 is a label
    for key, value in fields.items():
        if key in SHARED_KEYS:
            if value is not None:
                ours[key] = value
        elif key in DEFAULT_ONLY:
            if value not in DEFAULT_ONLY[key]:
                raise ValueError(f"preprocessor_config.json: {key}={value!r} has no counterpart here")
        elif key not in (*SIZE_KEYS, *IDENTITY_KEYS, *IGNORED_KEYS):
            raise ValueError(f"preprocessor_config.json: unknown field {key}={value!r} of an official processor")
    return ours


def rename_old(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Old names -> today's; an old and a new name with different values are a ValueError."""
    renamed = dict(fields)
    for old, new in RENAMED_KEYS.items():
        if old not in renamed:
            continue
        value = renamed.pop(old)
        if value is not None and renamed.get(new) not in (None, value):
            raise ValueError(f"{old}={value!r} contradicts {new}={renamed[new]!r}: give {new} only")
        if value is not None:
            renamed[new] = value
    return renamed


def to_official(
    settings: Mapping[str, Any], num_labels: int | None, *, kind: str = "MaskFormerImageProcessor"
) -> dict[str, Any]:
    """Translate our settings to the preprocessor_config.json of transformers' processor class `kind`.

    Task, label names and thresholds have no place there: transformers takes them from the model's config or from the
    call. `intensity_range`, `do_pad=False`, sigmoid class scores and mask-wise merging would change results silently:
    ValueError.
    """
    sayable = {"intensity_range": None, "do_pad": True, "class_activation": "softmax", "panoptic_merge": "argmax"}
    for key, allowed in sayable.items():
        if settings[key] != allowed:
            raise ValueError(f"{key}={settings[key]!r} cannot be said in {kind}'s file")
    official = {key: settings[key] for key in SHARED_KEYS if settings.get(key) is not None and key != "do_pad"}
    size = dict(settings["size"])
    official["size"] = size
    if "max_height" in size:  # one canvas: no rounding to a multiple, padded to exactly this size
        official["size_divisor"] = 1
        official.setdefault("pad_size", {"height": size["max_height"], "width": size["max_width"]})
    if num_labels is not None:
        official["num_labels"] = num_labels
    official["image_processor_type"] = kind
    return official


def _size(fields: Mapping[str, Any]) -> dict[str, int]:
    """`size` may be absent, an int (with max_size beside it), a (height, width) pair or a dict."""
    size = fields.get("size")
    longest = fields.get("max_size") or fields.get("_max_size") or OFFICIAL_SIZE["longest_edge"]
    if size is None:
        return {"shortest_edge": OFFICIAL_SIZE["shortest_edge"], "longest_edge": longest}
    if isinstance(size, int):
        return {"shortest_edge": size, "longest_edge": longest}
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping):
        return {"longest_edge": longest, **size} if set(size) == {"shortest_edge"} else dict(size)
    raise ValueError(f"preprocessor_config.json: size={size!r} cannot be read")
