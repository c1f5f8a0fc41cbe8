"""An ONNX file in the place of a model: onnxruntime computes the logits, everything around it stays."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.outputs import valid_extent

METADATA_KEY = "hf_maskformer"  # of the file's properties: what the config says of classes and task, as JSON
LOGITS = ("class_queries_logits", "masks_queries_logits")


@dataclass(frozen=True)
class OnnxConfig:
    """What post-processing needs to know of the model that was exported."""

    task: str
    id2label: dict[int, str]
    thing_label_ids: list[int]


class OnnxModel(nn.Module):
    """Runs `pixel_values` (B, C, H, W) and `pixel_mask` (B, H, W) through an exported file, on the CPU.

    Args:
        path: a file that `hf-maskformer export` wrote.
        threads: of onnxruntime; default: torch's number.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: there is no such file, or it is none of ours.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        self.session = open_session(path, threads)
        stored = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if stored is None:
            raise ValueError(f"{path} was not written by `hf-maskformer export`: it says nothing of classes and task")
        fields = json.loads(stored)
        names = {int(label): str(name) for label, name in fields["id2label"].items()}
        self.config = OnnxConfig(fields["task"], names, [int(label) for label in fields["thing_label_ids"]])
        outputs = [output.name for output in self.session.get_outputs()]
        if outputs != list(LOGITS):
            raise ValueError(
                f"{path} gives {outputs}, made for programs that want a finished map of classes; a Predictor needs "
                "logits: export without --semantic-map"
            )
        self.image_size = [side for side in self.session.get_inputs()[0].shape[2:] if isinstance(side, int)]

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ModelOutput:
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.int64)
        size = list(pixel_values.shape[-2:])
        if self.image_size and size != self.image_size:
            raise ValueError(f"this file takes images of {self.image_size} (height, width) only, got {size}")
        values = self.session.run(
            list(LOGITS), {"pixel_values": pixel_values.cpu().numpy(), "pixel_mask": pixel_mask.cpu().numpy()}
        )
        fields = {name: torch.from_numpy(value) for name, value in zip(LOGITS, values, strict=True)}
        return ModelOutput(**fields, valid_extent=valid_extent(pixel_mask.cpu()))


def open_session(path: str | Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: no such file, or onnxruntime cannot read it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files need onnxruntime: pip install 'hf_maskformer[export]'") from error
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise ValueError(f"{path} is no ONNX file that can be read: {error}") from error


def load_onnx(path: str | Path) -> tuple[OnnxModel, HfMaskFormerImageProcessor]:
    """The file and the image processor that stands beside it.

    Raises:
        ValueError: the file is none of ours, or its folder has no preprocessor_config.json.
    """
    model = OnnxModel(path)
    folder = Path(path).parent
    try:
        return model.eval(), HfMaskFormerImageProcessor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder} has no image processor (preprocessor_config.json) for {path}: {error}") from error
