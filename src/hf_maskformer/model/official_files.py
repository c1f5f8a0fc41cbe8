"""Files of a checkpoint: which ones hold its weights, where the base of an adapter is; a pickle is never opened."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils.import_utils import is_peft_available

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_model.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_QUIET = {"_raise_exceptions_for_missing_entries": False}


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords of `from_pretrained` that say where files are."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}


def check_config_file(source: str | Path, subfolder: str = "") -> None:
    """ValueError for a local directory without a config.json; Hub ids are not looked up."""
    folder = Path(source, subfolder)
    if not Path(source).is_dir() or (folder / CONFIG_FILE).is_file():
        return
    if not folder.is_dir():
        raise ValueError(f"{source} has no subfolder {subfolder!r}.")
    raise ValueError(
        f"{folder} has no {CONFIG_FILE}; it holds {sorted(entry.name for entry in folder.iterdir())[:10]}."
    )


def adapter_base(source: str | Path, hub: dict[str, Any]) -> str | Path:
    """What a PEFT adapter was trained on, if `source` holds one and no model; else `source`. The rule of AutoModel.

    Raises:
        ValueError: The adapter names no base, or its weights are only there as a pickle.
    """
    adapter = find_adapter_config_file(str(source), **hub) if is_peft_available() else None
    if adapter is None:
        return source
    if cached_file(source, ADAPTER_FILE, **hub, **_QUIET) is None:
        raise ValueError(f"{source} holds an adapter without {ADAPTER_FILE}; weights are read from safetensors only.")
    if Path(source, CONFIG_FILE).is_file():  # a whole model, whose adapter transformers puts on
        return source
    base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter} has base_model_name_or_path {base!r}: it must be the directory or Hub id of the model that "
            "the adapter belongs to. Or load that model and call its load_adapter."
        )
    return base


def weight_files(source: str | Path, hub: dict[str, Any], variant: str | None = None) -> list[str] | None:
    """The safetensors files of a checkpoint, one or its shards; None if there are none."""
    single = cached_file(source, _of_variant(SAFE_WEIGHTS_NAME, variant), **hub, **_QUIET)
    if single is not None:
        return [single]
    index = cached_file(source, _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **hub, **_QUIET)
    if index is None:
        return None
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [cached_file(source, shard, **hub) for shard in shards]


def no_safetensors(source: str | Path, hub: dict[str, Any], variant: str | None = None) -> str:
    """What is wrong where `weight_files` finds nothing, and what helps."""
    pickle_name, safe_name = _of_variant(WEIGHTS_NAME, variant), _of_variant(SAFE_WEIGHTS_NAME, variant)
    pickled = cached_file(source, pickle_name, **hub, **_QUIET)
    if pickled is None:
        return f"{source} has a {CONFIG_FILE} but no weights ({safe_name})."
    return (
        f"{source} has its weights only as a pickle ({pickle_name}), which can run code when it is opened and is "
        'never loaded. If you trust it, convert it once: python -c "import torch; '
        "from safetensors.torch import save_file; "
        f"save_file({{k: v.contiguous() for k, v in torch.load('{pickle_name}', weights_only=True).items()}}, "
        f"'{safe_name}', metadata={{'format': 'pt'}})\""
    )


def _of_variant(name: str, variant: str | None) -> str:
    """model.safetensors -> model.fp16.safetensors, as `save_pretrained(variant="fp16")` names files."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name
