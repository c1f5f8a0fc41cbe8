"""Exported files beside the models they were made of: the largest difference of each preset at full width.

    python benchmarks/export_parity.py [--presets lite-mobilenetv3-small maskformer-r50 ...] [--size 256]

Random weights; two built-in scenes of different shapes on a canvas of SIZE x SIZE, of half and of one and a half times
that, in batches of one and two. Files that take any size are tried at all three, others are made once for each. A
difference is measured by the largest logit.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_rows import commit_of

from hf_maskformer.export import export_model
from hf_maskformer.export.agreement import TOLERANCE, ExportError
from hf_maskformer.export.examples import example_inputs
from hf_maskformer.export.export import OTHER_SCALES
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, list_presets, preset

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("lite-", "maskformer-", "mask2former-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = [name for name in list_presets() if name.startswith(FAMILIES)]
    parser.add_argument("--presets", nargs="+", default=wanted, choices=list_presets())
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--keep", action="store_true", help="the rows of other presets that the file has")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/export_parity.json")
    arguments = parser.parse_args()
    rows = {}
    if arguments.keep and arguments.json.exists():
        rows = {one["preset"]: one for one in json.loads(arguments.json.read_text())["rows"]}
    for name in arguments.presets:
        rows[name] = row(name, arguments.size)
        print(line(rows[name]), flush=True)
    found = [rows[name] for name in wanted if name in rows]
    report = {"size": arguments.size, "tolerance": TOLERANCE, "torch": torch.__version__, "commit": commit_of(ROOT)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**report, "rows": found}, indent=2) + "\n")


def row(name: str, size: int) -> dict[str, Any]:
    """What `export_model` found at three sizes: one file for all where it takes any size, else a file for each."""
    torch.manual_seed(0)
    model = HfMaskFormerForUniversalSegmentation(preset(name)).eval()
    settle_batch_norms(model, example_inputs(image_processor_for(preset(name, image_size=[size, size])), None))
    started = time.perf_counter()
    found: dict[str, Any] = {"preset": name}
    try:
        record = exported(model, name, size)
        sizes = [size] if record["free_size"] else [size, *(round(size * scale) for scale in OTHER_SCALES)]
        records = [record, *(exported(model, name, other) for other in sizes[1:])]
        found |= {"free_size": record["free_size"], "sizes": [size, *(round(size * scale) for scale in OTHER_SCALES)]}
        found["largest_difference"] = {
            output: max(one["largest_difference"][output] for one in records)
            for output in record["largest_difference"]
        }
    except ExportError as error:
        found |= {"error": str(error), "rounding": rounding(model, name, size)}
    return {**found, "seconds": time.perf_counter() - started}


@torch.no_grad()
def rounding(model: Any, name: str, size: int) -> dict[str, float]:
    """How far torch's own float32 is from float64 at the three sizes, measured as the files' differences are: masked
    attention turns the rounding of a mask logit near 0 into another view of the image."""
    found: dict[str, float] = {}
    for side in (size, *(round(size * scale) for scale in OTHER_SCALES)):
        inputs = example_inputs(image_processor_for(preset(name, image_size=[side, side])), None)
        outputs = [
            model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
            for dtype in (torch.float32, torch.float64)
        ]
        for key in ("class_queries_logits", "masks_queries_logits"):
            actual, expected = (output[key].double() for output in outputs)
            difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
            found[key] = max(found.get(key, 0.0), difference)
    model.float()
    return found


@torch.no_grad()
def settle_batch_norms(model: Any, inputs: dict[str, Any]) -> None:
    """Give batch norms the statistics of the images, as training does. With those of fresh weights a ResNet-101's
    activations grow to 3e5, and torch's own float32 logits differ from float64 by 4e-4."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls
        norm.train()
    if norms:
        model(**inputs)
    model.eval()


def exported(model: Any, name: str, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return export_model(model, image_processor_for(preset(name, image_size=[size, size])), folder).record


def line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {found['preset']} | {found['error']} | torch's float32 against float64: {found['rounding']} |"
    sizes = "any size" if found["free_size"] else "a file for each size"
    differences = ", ".join(f"{name} {value:.1e}" for name, value in found["largest_difference"].items())
    return f"| {found['preset']} | {sizes} | {differences} | {found['seconds']:.0f} s |"


if __name__ == "__main__":
    main()
