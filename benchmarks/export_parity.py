"""Exported files beside the models they were made of: the largest difference of each preset at full width.

    python benchmarks/export_parity.py [--presets lite-mobilenetv3-small maskformer-r50 ...] [--size 256]

Random weights; two built-in scenes of different shapes on a canvas of SIZE x SIZE, in batches of one and two, and for
files with a free size at half and at one and a half times that. A difference is measured by the largest logit.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training_rows import commit_of

from hf_maskformer.export import export_model
from hf_maskformer.export.agreement import TOLERANCE, ExportError
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, list_presets, preset

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("lite-", "maskformer-", "mask2former-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = [name for name in list_presets() if name.startswith(FAMILIES)]
    parser.add_argument("--presets", nargs="+", default=wanted, choices=list_presets())
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/export_parity.json")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.presets:
        rows.append(row(name, arguments.size))
        print(line(rows[-1]), flush=True)
    report = {"size": arguments.size, "tolerance": TOLERANCE, "torch": torch.__version__, "commit": commit_of(ROOT)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n")


def row(name: str, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = preset(name, image_size=[size, size])
    model = HfMaskFormerForUniversalSegmentation(config).eval()
    started = time.perf_counter()
    found: dict[str, Any] = {"preset": name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found |= export_model(model, image_processor_for(config), folder).record
        except ExportError as error:
            found["error"] = str(error)
    return {**found, "seconds": time.perf_counter() - started}


def line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {found['preset']} | {found['error']} |"
    sizes = "any size" if found["free_size"] else "one size"
    differences = ", ".join(f"{name} {value:.1e}" for name, value in found["largest_difference"].items())
    return f"| {found['preset']} | {sizes} | {differences} | {found['seconds']:.0f} s |"


if __name__ == "__main__":
    main()
