"""Parameters and FLOPs of the presets beside the published figures.

    python benchmarks/complexity.py [--only maskformer-r50 ...]

Models stand on torch's meta device: no weights, no arithmetic. All figures are of one image at inference, and one
multiply-add is one FLOP, as in the papers.

`products` is what our model computes: every convolution and matrix product, those of attention included, and nothing
else; the masks of the last layer only, and for masked attention those of the earlier layers at the size of the map
that is looked at.

`counted` is the same pass seen with the counter that the papers used; only this is comparable to their figures.

- MaskFormer and Mask2Former: `tools/analyze_model.py` of the official code, which is fvcore through detectron2. It
  traces the whole model with its post-processing. To the products come: 5 for each element of a layer or group norm, 2
  of a batch norm; for each element written, 4 of a bilinear and 1 of a nearest resize and 4 of deformable attention's
  sampling (the official file has a line "for FLOPs calculation only" that replaces the CUDA kernel, which the counter
  cannot see, by grid_sample); the masks of all layers at stride 4, which the published models make in inference too;
  and the merging into a semantic map, queries x classes x pixels, at the size of the canvas on ADE20K and of the
  original image on COCO. Softmax, activations, sums, position codes are not counted.
- Panoptic SegFormer: `tools/ana_tools/get_flops.py` of the official code, which is mmcv's counter. It sees modules,
  not operations: linear layers, convolutions and their biases, 2 for each element of a norm, 1 of a ReLU or of what a
  pooling reads. It does not see the products of queries, keys and values, nor sampling; the mask decoders' masks of
  all blocks count (they are linear layers). It would pass over the projections inside of torch's MultiheadAttention,
  which are counted here (0.5 G of 300 queries).

Inputs: on ADE20K the crop, 512x512 (640x640 with Swin-B). On COCO the papers average over the first 100 validation
images, the shortest side 800, the longest at most 1333. Their mean area is 888,906 pixels, and 903,803 once sides are
padded to multiples of 32 as Mask2Former does (MaskFormer does not pad there); one image of 800x1111 and of 800x1130
stands for them, and 273,653 pixels for their original sizes. Panoptic SegFormer's script takes 1200x800.

The published figures are rounded; those of parameters to 1 M (0.1 M in Panoptic SegFormer). Panoptic SegFormer gives
no FLOPs for PVTv2-B0 and -B2 that we know of. The published counts are themselves only good to some percent: for
MaskFormer with Swin-S the paper has 79 G, and its author's later count of the same model 81.1 G
(https://github.com/facebookresearch/MaskFormer/issues/50).
"""

import argparse
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_rows import commit_of

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import preset

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_PARAMETERS, ALLOWED_FLOPS = 0.01, 0.05
ADE_CLASSES, COCO_CLASSES, COCO_THINGS = 150, 133, 80
COCO_ORIGINAL_PIXELS = 273_653
MASK_STRIDE = 4
LOOKED_AT = (32, 16, 8)  # strides of the maps of masked attention, layer by layer
ATEN = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """A preset, where its figures were published, and those: millions of parameters, 10^9 FLOPs."""

    preset: str
    data: str
    size: tuple[int, int]
    parameters: float
    flops: float | None


CASES = [
    Case("maskformer-r50", "ADE20K", (512, 512), 41, 53),
    Case("maskformer-swin-tiny", "ADE20K", (512, 512), 42, 55),
    Case("maskformer-swin-small", "ADE20K", (512, 512), 63, 79),
    Case("maskformer-swin-base", "ADE20K", (640, 640), 102, 195),
    Case("maskformer-r50-panoptic", "COCO", (800, 1111), 45, 181),
    Case("mask2former-r50", "ADE20K", (512, 512), 44, 71),
    Case("mask2former-r50", "COCO", (800, 1130), 44, 226),
    Case("mask2former-r101", "COCO", (800, 1130), 63, 293),
    Case("mask2former-swin-tiny", "COCO", (800, 1130), 47, 232),
    Case("mask2former-swin-small", "COCO", (800, 1130), 69, 313),
    Case("mask2former-swin-base", "COCO", (800, 1130), 107, 466),
    Case("panoptic-segformer-r50", "COCO", (1200, 800), 51.0, 214),
    Case("panoptic-segformer-pvtv2-b0", "COCO", (1200, 800), 24.2, None),
    Case("panoptic-segformer-pvtv2-b2", "COCO", (1200, 800), 43.6, None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(case.preset for case in CASES))
    parser.add_argument("--only", nargs="+", choices=names, metavar="PRESET", help=f"of {', '.join(names)}")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "complexity.json")
    arguments = parser.parse_args()
    rows = [row_of(case) for case in CASES if arguments.only is None or case.preset in arguments.only]
    print(f"{figures_table(rows)}\n\n{parts_table(rows)}\n\n{verdict(rows)}")
    report = {
        "allowed": {"parameters": ALLOWED_PARAMETERS, "flops": ALLOWED_FLOPS},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit_of(ROOT),
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def row_of(case: Case) -> dict[str, Any]:
    """Parameters in millions, FLOPs in 10^9; a difference is relative to the published figure."""
    model = build(case)
    products, parts = (module_parts if model.config.query_decoder == "location" else traced_parts)(model, case)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    counted = sum(parts.values())
    return {
        **asdict(case),
        "our_parameters": parameters,
        "parameters_difference": parameters / case.parameters - 1,
        "our_products": products,
        "products_difference": None if case.flops is None else products / case.flops - 1,
        "our_counted": counted,
        "counted_difference": None if case.flops is None else counted / case.flops - 1,
        "parts_of_counted": parts,
    }


def build(case: Case) -> HfMaskFormerForUniversalSegmentation:
    """The preset with the labels of the data, on the meta device."""
    classes = ADE_CLASSES if case.data == "ADE20K" else COCO_CLASSES
    fields: dict[str, Any] = {"id2label": {index: f"class {index}" for index in range(classes)}}
    if case.data == "COCO":
        fields["thing_label_ids"] = list(range(COCO_THINGS))
    with torch.device("meta"):
        model = HfMaskFormerForUniversalSegmentation(preset(case.preset, **fields))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# As fvcore counts
# ---------------------------------------------------------------------------------------------------------------------


def per_input(cost: int) -> Any:
    return lambda input_shape, *_, **__: cost * math.prod(input_shape)


def per_output(cost: int) -> Any:
    return lambda *_, out_shape, **__: cost * math.prod(out_shape)


FVCORE_COSTS = {
    ATEN.native_layer_norm: ("norms", per_input(5)),
    ATEN.native_group_norm: ("norms", per_input(5)),
    ATEN.native_batch_norm: ("norms", per_input(2)),
    ATEN.upsample_bilinear2d: ("resizing", per_output(4)),
    ATEN.upsample_nearest2d: ("resizing", per_output(1)),
    ATEN.grid_sampler_2d: ("sampling", per_output(4)),
}


def operations(model: nn.Module, size: tuple[int, int]) -> Counter[str]:
    """10^9 FLOPs of one pass of our model: products and what fvcore counts besides."""
    costs = {operation: cost for operation, (_, cost) in FVCORE_COSTS.items()}
    with FlopCounterMode(display=False, custom_mapping=costs) as counter:
        model(torch.zeros(1, 3, *size, device="meta"))
    parts: Counter[str] = Counter()
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind, scale = (FVCORE_COSTS[operation][0], 1) if operation in FVCORE_COSTS else ("products", 2)
        parts[kind] += flops / scale / 1e9  # torch counts a multiply-add as two
    return parts


def traced_parts(model: HfMaskFormerForUniversalSegmentation, case: Case) -> tuple[float, dict[str, float]]:
    """Our products, and the parts of the count that `tools/analyze_model.py` would give."""
    parts = operations(model, case.size)
    products = parts["products"]
    config, (height, width) = model.config, case.size
    pixels = height * width if case.data == "ADE20K" else COCO_ORIGINAL_PIXELS
    parts["resizing"] += 4 * config.num_queries * height * width / 1e9  # of the masks, to the canvas
    if case.data == "COCO":
        parts["resizing"] += 4 * config.num_queries * pixels / 1e9  # and from there to the original size
    parts["merging"] = config.num_queries * config.num_labels * pixels / 1e9
    parts["earlier masks"] = earlier_masks(model, case.size)
    return products, dict(parts)


def earlier_masks(model: HfMaskFormerForUniversalSegmentation, size: tuple[int, int]) -> float:
    """10^9 multiply-adds of the masks at stride 4 before the last layer, less what our masked attention has made
    instead of them."""
    config = model.config
    layers, masked = config.query_decoder_layers, config.query_decoder == "masked"
    whole = cells(size, MASK_STRIDE) * (layers if masked else layers - 1)
    small = sum(cells(size, LOOKED_AT[layer % len(LOOKED_AT)]) for layer in range(layers)) if masked else 0
    return config.num_queries * config.mask_dim * (whole - small) / 1e9


def cells(size: tuple[int, int], stride: int) -> int:
    return math.ceil(size[0] / stride) * math.ceil(size[1] / stride)


# ---------------------------------------------------------------------------------------------------------------------
# As mmcv counts
# ---------------------------------------------------------------------------------------------------------------------


def module_parts(model: HfMaskFormerForUniversalSegmentation, case: Case) -> tuple[float, dict[str, float]]:
    """Our products, and the parts of the count that `get_flops.py` of Panoptic SegFormer would give."""
    products = operations(model, case.size)["products"]
    parts: Counter[str] = Counter()

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kind, flops = module_cost(module, inputs[0], output)
        parts[kind] += flops / 1e9

    counted = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.ReLU, nn.MaxPool2d)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, counted)]
    model(torch.zeros(1, 3, *case.size, device="meta"), output_auxiliary_logits=True)  # the masks of all blocks
    for hook in hooks:
        hook.remove()
    return products, dict(parts)


def module_cost(module: nn.Module, values: torch.Tensor, output: torch.Tensor) -> tuple[str, int]:
    if isinstance(module, nn.Linear):
        return "products", values.numel() * module.out_features
    if isinstance(module, nn.Conv2d):
        return "products", output.numel() * (module.weight[0].numel() + (module.bias is not None))
    if isinstance(module, nn.ReLU | nn.MaxPool2d):
        return "activations", values.numel()
    return "norms", 2 * values.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def figures_table(rows: list[dict[str, Any]]) -> str:
    head = ["preset", "data", "input", "M params", "published", "difference"]
    head += ["G products", "difference", "G counted", "published", "difference"]
    lines = []
    for row in rows:
        height, width = row["size"]
        line = [row["preset"], row["data"], f"{height}x{width}", f"{row['our_parameters']:.1f}"]
        line += [f"{row['parameters']:g}", percent(row["parameters_difference"])]
        line += [f"{row['our_products']:.1f}", percent(row["products_difference"]), f"{row['our_counted']:.1f}"]
        line += ["-" if row["flops"] is None else f"{row['flops']:g}", percent(row["counted_difference"])]
        lines.append(line)
    return markdown(head, lines, words=3)


def parts_table(rows: list[dict[str, Any]]) -> str:
    """What `counted` is made of."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["parts_of_counted"]))
    lines = []
    for row in rows:
        parts = row["parts_of_counted"]
        lines.append([row["preset"], row["data"], *(f"{parts[kind]:.2f}" if kind in parts else "-" for kind in kinds)])
    return markdown(["preset", "data", *(f"G {kind}" for kind in kinds)], lines, words=2)


def markdown(head: list[str], lines: list[list[str]], *, words: int) -> str:
    """A table whose first `words` columns are text, the others numbers."""
    rule = [" --- "] * words + [" ---: "] * (len(head) - words)
    return "\n".join(["| " + " | ".join(head) + " |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(x)} |" for x in lines)])


def percent(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.1%}"


def verdict(rows: list[dict[str, Any]]) -> str:
    sentences = []
    for name, key, allowed in (
        ("parameters", "parameters_difference", ALLOWED_PARAMETERS),
        ("FLOPs as counted", "counted_difference", ALLOWED_FLOPS),
    ):
        known = [row for row in rows if row[key] is not None]
        missed = [f"{row['preset']} ({row['data']}) {percent(row[key])}" for row in known if abs(row[key]) > allowed]
        sentences.append(
            f"{name}: {len(known) - len(missed)} of {len(known)} within {allowed:.0%}"
            + (f"; not: {', '.join(missed)}" if missed else "")
        )
    return "\n".join(sentences)


if __name__ == "__main__":
    main()
