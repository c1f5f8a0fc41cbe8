"""Metrics as JSON: one flat object that any reader takes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_ready(value: Any) -> Any:
    """Arrays, tensors and their numbers as lists and numbers; nan and infinity, which JSON does not know, as None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics; nan (a class that is absent) becomes null. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json_ready(metrics), indent=2) + "\n", encoding="utf-8")
