"""What a table about one of transformers' model types holds."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class OfficialFormat:
    """Names of one official checkpoint format <-> ours.

    Weight rows are (pattern of the official name, our name) with at most one group; the first match counts, and the
    reverse direction is derived from them.
    """

    model_type: str
    architecture: str
    image_processor: str
    config_class: type[PreTrainedConfig]
    parts: dict[str, Any]  # our fields that say which parts the model has; nothing else can be written
    fields: dict[str, tuple[str, ...]]  # official field -> our fields
    defaults: dict[str, Any]  # of the official fields that a file may leave out
    weight_names: list[tuple[str, str]]
    default_backbone: dict[str, Any]
    last_norm: str  # Swin's last norm, which is never used: its official name
    swin_names: list[tuple[str, str]] = field(default_factory=list)  # where Swin's names differ from those in ours
    decoder_fields: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of a nested decoder_config
    decoder_defaults: dict[str, Any] = field(default_factory=dict)
    neutral_values: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # other values would change the model
    training_only: dict[str, Any] = field(default_factory=dict)  # our fields that files cannot hold, as published
    offsets: dict[str, int] = field(default_factory=dict)  # official value minus ours
    counts_norms_from_zero: bool = False  # Swin's output norms: 0, 1, ... instead of stage1, stage2, ...
    joint_attention: str | None = None  # pattern of attention weights stored as one matrix for query, key and value
