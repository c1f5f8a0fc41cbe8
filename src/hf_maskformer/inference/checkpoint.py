"""Loads a model with its image processor and refuses a pair that does not belong together."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_maskformer.inference.onnx_model import load_onnx
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.official import official_source

ONNX_SUFFIX = ".onnx"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_checkpoint(source: str | Path) -> tuple[Any, HfMaskFormerImageProcessor]:
    """Model (in eval mode) and image processor of a directory or Hub id, ours or an official one, or of an ONNX file.

    The files of an official checkpoint store neither the task nor which classes are things: `task`, `id2label` and
    `thing_label_ids` of its processor are None. Class names stand in the model's config.

    Raises:
        ValueError: the directory does not exist, lacks a file, holds another model type or only pickled weights, a
            file is damaged, or config and image processor differ in task, labels or thing classes.
    """
    folder = Path(source)
    if folder.suffix == ONNX_SUFFIX and not folder.is_dir():
        onnx_model, processor = load_onnx(folder)
        check_agreement(onnx_model.config, processor, str(source))
        return onnx_model, processor
    if folder.is_dir():
        _check_processor_file(folder)
    elif not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{source} is no directory and cannot be a Hub id (name or owner/name)")
    try:
        model = HfMaskFormerForUniversalSegmentation.from_pretrained(source)
        processor = HfMaskFormerImageProcessor.from_pretrained(source)
        if official_source(source) is not None:
            processor.task = None  # the reader of official files has to put something
    except (OSError, SafetensorError) as error:
        kind = "directory" if folder.is_dir() else "directory or Hub id"
        raise ValueError(f"{source} is no {kind} that can be loaded: {error}") from error
    check_agreement(model.config, processor, str(source))
    return model.eval(), processor


def check_agreement(config: Any, processor: Any, where: str) -> None:
    """Raises ValueError if the model's config and its image processor differ in task, labels or thing classes.

    A setting that the processor leaves open (None) agrees with everything: official processors store none of them.
    """
    pairs = {
        "task": (config.task, processor.task),
        "id2label": (_names(config.id2label), _names(processor.id2label)),
        "thing_label_ids": (_ids(config.thing_label_ids), _ids(processor.thing_label_ids)),
    }
    for name, (in_config, in_processor) in pairs.items():
        if in_config is not None and in_processor is not None and in_config != in_processor:
            raise ValueError(
                f"{where}: {name} is {in_config!r} in the model's config but {in_processor!r} in the image processor; "
                f"they must be the same"
            )


def _check_processor_file(folder: Path) -> None:
    """A missing config or missing weights are the model's own check; this one is the processor's."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" in names and IMAGE_PROCESSOR_NAME not in names:
        raise ValueError(f"{folder} has no {IMAGE_PROCESSOR_NAME}; it holds {names[:10]}")


def _names(id2label: Any) -> dict[int, str] | None:
    return None if id2label is None else {int(label): str(name) for label, name in id2label.items()}


def _ids(label_ids: Any) -> list[int] | None:
    return None if label_ids is None else sorted(int(label) for label in label_ids)
