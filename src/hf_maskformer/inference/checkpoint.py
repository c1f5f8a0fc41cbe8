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

ONNX_SUFFIX, PROGRAM_SUFFIX = ".onnx", ".pt2"
EXPORT_RECORD = "export.json"  # that `hf-maskformer export` leaves; its module imports this package, not the reverse
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_checkpoint(source: str | Path) -> tuple[Any, HfMaskFormerImageProcessor]:
    """Model (in eval mode) and image processor of a directory or Hub id, ours or an official one, or of an ONNX file.

    The files of an official checkpoint store neither the task nor which classes are things: `task`, `id2label` and
    `thing_label_ids` of its processor are None. Class names stand in the model's config.

    Raises:
        ValueError: the directory does not exist, lacks a file, holds another model type, only pickled weights or only
            exported files, a file is damaged or of another kind, or config and image processor differ in task, labels
            or thing classes.
    """
    folder = Path(source)
    if folder.suffix == ONNX_SUFFIX and not folder.is_dir():
        onnx_model, processor = load_onnx(folder)
        check_agreement(onnx_model.config, processor, str(source))
        return onnx_model, processor
    if folder.is_dir():
        _check_files(folder)
    elif folder.suffix == PROGRAM_SUFFIX:
        raise ValueError(
            f"{source} is a torch-export program, which torch.export.load loads; Predictor runs checkpoints (a "
            f"directory or Hub id) and {ONNX_SUFFIX} files, which `hf-maskformer export --format onnx` writes"
        )
    elif folder.is_file():
        raise ValueError(f"{source} is a file; pass the directory of a checkpoint, a Hub id or an {ONNX_SUFFIX} file")
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


def _check_files(folder: Path) -> None:
    """A missing config or missing weights are the model's own check; these are the processor's and the export's."""
    names = sorted(path.name for path in folder.iterdir())
    if EXPORT_RECORD in names and "config.json" not in names:
        programs = [str(folder / name) for name in names if name.endswith((ONNX_SUFFIX, PROGRAM_SUFFIX))]
        runnable = [program for program in programs if program.endswith(ONNX_SUFFIX)]
        if runnable:
            way_out = f"pass a file in it: {' or '.join(runnable)}"
        else:
            found = " or ".join(programs) or "its file, which is not there"
            way_out = (
                f"torch.export.load loads {found}; for Predictor pass the checkpoint that it was made of, or an "
                f"{ONNX_SUFFIX} file (`hf-maskformer export --format onnx`)"
            )
        raise ValueError(f"{folder} holds an exported model and no checkpoint (config.json); {way_out}")
    if "config.json" in names and IMAGE_PROCESSOR_NAME not in names:
        raise ValueError(f"{folder} has no {IMAGE_PROCESSOR_NAME}; it holds {names[:10]}")


def _names(id2label: Any) -> dict[int, str] | None:
    return None if id2label is None else {int(label): str(name) for label, name in id2label.items()}


def _ids(label_ids: Any) -> list[int] | None:
    return None if label_ids is None else sorted(int(label) for label in label_ids)
