"""Smaller forms of an ONNX file: float16, and 8 bits after calibration on images or without."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.export.examples import example_inputs
from hf_maskformer.inference.onnx_model import METADATA_KEY

IMAGES_AT_ONCE = 4
EIGHT_BITS = ("Conv",)  # most of the work; with all that onnxruntime can quantise a model's maps were lost altogether
LEAST_WEIGHTS = (
    4000  # of a convolution in 8 bits: smaller ones lose more by the conversions around them than they gain
)


def make_variant(
    variant: str, source: Path, processor: Any, data: SegmentationData | None, calibration_images: int
) -> Path:
    """The variant's file beside `source`, named model.VARIANT.onnx.

    Raises:
        ValueError: an unknown variant.
        ImportError: onnx or onnxruntime is not installed.
    """
    makers: dict[str, Callable[[Path, Path], None]] = {
        "fp16": _float16,
        "int8": lambda origin, path: _static_int8(origin, path, _batches(processor, data, calibration_images)),
        "int8-dynamic": _dynamic_int8,
    }
    if variant not in makers:
        raise ValueError(f"variant must be one of {', '.join(makers)}, got {variant!r}")
    target = source.with_suffix(f".{variant}{source.suffix}")
    makers[variant](source, target)
    _copy_description(source, target)
    return target


def _float16(source: Path, target: Path) -> None:
    """Weights and arithmetic in half precision; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def _dynamic_int8(source: Path, target: Path) -> None:
    """Weights of matrix products in 8 bits; the range of what they are multiplied with is found at each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], per_channel=True)


def _static_int8(source: Path, target: Path, batches: Iterator[dict[str, Any]]) -> None:
    """Convolutions in 8 bits, with ranges measured on images; 7 bits for weights, whose products fit 16 bits then.

    Depthwise and small convolutions stay as they are. Processors without 8-bit dot products (AVX2) add pairs of
    products in 16 bits, which overflow otherwise.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    prepared = target.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(EIGHT_BITS),
        nodes_to_exclude=_slower_in_8_bits(prepared),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def _slower_in_8_bits(path: Path) -> list[str]:
    """Names of the depthwise and the small convolutions."""
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    for number, node in enumerate(graph.node):
        node.name = node.name or f"unnamed_{number}"  # they are told apart by their names
    onnx.save(model, str(path))
    weights = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    names = []
    for node in graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type in EIGHT_BITS and (groups > 1 or weights.get(node.input[1], 0) < LEAST_WEIGHTS):
            names.append(node.name)
    return names


def _batches(processor: Any, data: SegmentationData | None, count: int) -> Iterator[dict[str, Any]]:
    inputs = example_inputs(processor, data, count if data is None else min(count, len(data)))
    for start in range(0, len(inputs["pixel_values"]), IMAGES_AT_ONCE):
        yield {name: value[start : start + IMAGES_AT_ONCE].numpy() for name, value in inputs.items()}


def _copy_description(source: Path, target: Path) -> None:
    """The quantisers drop a file's properties."""
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load(str(source), load_external_data=False).metadata_props}
    proto = onnx.load(str(target))
    if METADATA_KEY not in {entry.key for entry in proto.metadata_props}:
        entry = proto.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, properties[METADATA_KEY]
        onnx.save(proto, str(target))
