"""A trained model -> checked files in one folder: the program, variants of it, the image processor, a record."""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.export.agreement import Agreement, ExportError, Run, check
from hf_maskformer.export.examples import example_inputs, on_one_canvas, resized
from hf_maskformer.export.graph import INPUTS, LogitsGraph, SemanticGraph, may_have_free_size, trace
from hf_maskformer.export.variants import make_variant
from hf_maskformer.inference.checkpoint import EXPORT_RECORD
from hf_maskformer.inference.onnx_model import METADATA_KEY, open_session

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "torch-export")
FILE_NAMES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
RECORD_NAME = EXPORT_RECORD
OPSET = 18  # the first with the antialiasing flag of Resize; read by onnxruntime from 1.14 on
OTHER_SCALES = (0.5, 1.5)  # of the canvas, that a file with a free size is also tried at


@dataclass
class Exported:
    """What was written.

    Attributes:
        files: path of each file by its name: "float32" and the variants, or "torch-export".
        record: what stands in export.json.
    """

    files: dict[str, Path] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def export_model(
    model: Any,
    processor: Any,
    output_dir: str | Path,
    *,
    format: str = "onnx",
    variants: Sequence[str] = (),
    semantic_map: bool = False,
    fixed_size: bool = False,
    data: SegmentationData | None = None,
    calibration_data: SegmentationData | None = None,
    calibration_images: int = 64,
) -> Exported:
    """Write `model.onnx` or `model.pt2` and its variants, each checked, into a folder with the image processor.

    The exported program is compared with the model on images of `data` (built-in scenes without) for batches of one
    and two images and, where the size is free, two further sizes. Batches of any number are taken.

    Args:
        model: a `HfMaskFormerForUniversalSegmentation`; put into eval mode, on the CPU and in float32.
        processor: its image processor, written beside the file; for a file of one size with a canvas of that size.
        output_dir: created where it does not exist; files of the same name are replaced.
        format: "onnx" or "torch-export".
        variants: of ONNX: "fp16" (half the size, for GPUs), "int8" (convolutions in 8 bits), "int8-dynamic" (matrix
            products in 8 bits, nothing to calibrate).
        semantic_map: the program gives a map of classes instead of logits.
        fixed_size: take images of the processor's canvas only, even where any size is possible.
        data: images to check with.
        calibration_data: images whose ranges "int8" is made for; default: `data`, or built-in scenes, which fit no
            model of photographs.
        calibration_images: how many of them.

    Raises:
        ExportError: the program's numbers differ from the model's; no file is kept.
        ValueError: an argument that is not allowed.
        ImportError: a package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if variants and (format != "onnx" or semantic_map):
        raise ValueError(f"variants {', '.join(variants)} are made of ONNX files with logits only")
    graph = (SemanticGraph if semantic_map else LogitsGraph)(model.to("cpu", torch.float32).eval()).eval()
    if fixed_size or not may_have_free_size(model.config):
        processor = on_one_canvas(processor)
    examples = example_inputs(processor, data)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = Exported(record={"format": format, "image_size": list(examples["pixel_values"].shape[-2:])})
    with tempfile.TemporaryDirectory(dir=folder) as working:
        draft = Path(working) / FILE_NAMES[format]
        agreement, free_size = _write(graph, examples, draft, fixed_size=fixed_size)
        result.record |= {
            "free_size": free_size,
            **{name: value for name, value in asdict(agreement).items() if value},
        }
        drafts = {"float32" if format == "onnx" else format: draft}
        for variant in variants:
            source = data if calibration_data is None else calibration_data
            drafts[variant] = make_variant(variant, draft, processor, source, calibration_images)
        for name, path in drafts.items():
            result.files[name] = folder / path.name
            os.replace(path, result.files[name])
    processor.to_json_file(folder / IMAGE_PROCESSOR_NAME)
    result.record["megabytes"] = {name: round(path.stat().st_size / 1e6, 2) for name, path in result.files.items()}
    write_record(result, folder)
    return result


def write_record(result: Exported, folder: str | Path) -> None:
    """export.json: format, sizes, differences, and what was added to `result.record` since."""
    Path(folder, RECORD_NAME).write_text(json.dumps(result.record, indent=2) + "\n", encoding="utf-8")


def _write(graph: LogitsGraph, examples: dict[str, Tensor], path: Path, *, fixed_size: bool) -> tuple[Agreement, bool]:
    """The largest differences of the written program from the model, and whether it takes images of any size.

    Where code of the model depends on the size, the program is made for one size; with a warning, if that was not
    known beforehand.
    """
    write = _write_onnx if path.name == FILE_NAMES["onnx"] else _write_program
    batches = [examples, {name: value[:1] for name, value in examples.items()}]
    if not fixed_size and may_have_free_size(graph.model.config):
        others = [resized(examples, scale) for scale in OTHER_SCALES]
        try:
            return check(write(trace(graph, examples, free_size=True), graph, path), graph, batches + others), True
        except (RuntimeError, ValueError, AssertionError) as error:  # torch's own are RuntimeErrors
            height, width = examples["pixel_values"].shape[-2:]
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("the file takes images of %dx%d only; a free size failed: %s", height, width, reason)
    return check(write(trace(graph, examples, free_size=False), graph, path), graph, batches), False


def _write_onnx(program: ExportedProgram, graph: LogitsGraph, path: Path) -> Run:
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch.onnx needs, checked before it works for minutes
    except ImportError as error:
        raise ImportError("export to ONNX needs onnx and onnxscript: pip install 'hf_maskformer[export]'") from error
    converted: Any = torch.onnx.export(
        program,
        input_names=list(INPUTS),
        output_names=list(graph.outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    proto = converted.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(_description(graph.model.config))
    onnx.save(proto, str(path))
    session = open_session(path)
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        except (Fail, InvalidArgument, RuntimeException) as error:
            raise ExportError(f"onnxruntime cannot run the exported file; no file was kept: {error}") from error
        return [torch.from_numpy(value) for value in values]

    return run


def _write_program(program: ExportedProgram, graph: LogitsGraph, path: Path) -> Run:
    torch.export.save(program, str(path))
    module = program.module()
    return lambda inputs: [value.detach() for value in module(**inputs)]


def _description(config: Any) -> dict[str, Any]:
    return {"task": config.task, "id2label": config.id2label, "thing_label_ids": list(config.thing_label_ids)}
