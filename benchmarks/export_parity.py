"""Exported files beside the models they were made of: the largest difference of each preset at full width.

    python benchmarks/export_parity.py [--presets lite-mobilenetv3-small maskformer-r50 ...] [--size 256]
        [--train-steps 200] [--learning-rate 3e-4]

Weights are random, or trained for that many steps on built-in scenes: masked attention decides by the sign of a mask
logit what a query sees, and random weights leave many of them at 0 but for rounding, which trained weights do not.
Two built-in scenes of different shapes on a canvas of SIZE x SIZE, of half and of one and a half times that, in
batches of one and two. Files that take any size are tried at all three, others are made once for each. A difference is
measured by the largest logit.
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

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.scenes import load_scenes, scene_label_spec
from hf_maskformer.export import export_model
from hf_maskformer.export.agreement import TOLERANCE, ExportError
from hf_maskformer.export.examples import example_inputs
from hf_maskformer.export.export import OTHER_SCALES
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, list_presets, preset

ROOT = Path(__file__).resolve().parent.parent
DIFFERENCES = ("largest_difference", "largest_difference_in_last_digits")  # of a record, see `Agreement`
FAMILIES = ("lite-", "maskformer-", "mask2former-")
TRAINED_ON = ("pixel_values", "pixel_mask", "mask_labels", "class_labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = [name for name in list_presets() if name.startswith(FAMILIES)]
    parser.add_argument("--presets", nargs="+", default=wanted, choices=list_presets())
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--train-steps", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--keep", action="store_true", help="the other rows that the file has")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/export_parity.json")
    arguments = parser.parse_args()
    rows = {}
    if arguments.keep and arguments.json.exists():
        rows = {(one["preset"], one["train_steps"]): one for one in json.loads(arguments.json.read_text())["rows"]}
    for name in arguments.presets:
        found = row(name, arguments.size, arguments.train_steps, arguments.learning_rate)
        rows[name, arguments.train_steps] = found
        print(line(found), flush=True)
    order = sorted(rows, key=lambda key: (wanted.index(key[0]), key[1]))
    report = {"size": arguments.size, "tolerance": TOLERANCE, "torch": torch.__version__, "commit": commit_of(ROOT)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**report, "rows": [rows[key] for key in order]}, indent=2) + "\n")


def row(name: str, size: int, train_steps: int, rate: float) -> dict[str, Any]:
    """What `export_model` found at three sizes: one file for all where it takes any size, else a file for each."""
    torch.manual_seed(0)
    labels = label_fields() if train_steps else {}
    model = HfMaskFormerForUniversalSegmentation(preset(name, **labels)).eval()
    settle_batch_norms(model, example_inputs(processor_of(name, size), None))
    found: dict[str, Any] = {"preset": name, "train_steps": train_steps}
    if train_steps:
        found["loss"] = train(model, processor_of(name, size, **labels), train_steps, rate)
    started = time.perf_counter()
    try:
        record = exported(model, name, size)
        sizes = [size] if record["free_size"] else [size, *(round(size * scale) for scale in OTHER_SCALES)]
        records = [record, *(exported(model, name, other) for other in sizes[1:])]
        found |= {"free_size": record["free_size"], "sizes": [size, *(round(size * scale) for scale in OTHER_SCALES)]}
        found |= {key: largest([one.get(key, {}) for one in records]) for key in DIFFERENCES}
    except ExportError as error:
        found |= {"error": str(error), "rounding": rounding(model, name, size)}
    return {**found, "seconds": time.perf_counter() - started}


def largest(differences: list[dict[str, float]]) -> dict[str, float]:
    names = {name: None for one in differences for name in one}
    return {name: max(one.get(name, 0.0) for one in differences) for name in names}


@torch.no_grad()
def rounding(model: Any, name: str, size: int) -> dict[str, float]:
    """How far torch's own float32 is from float64 at the three sizes, measured as the files' differences are: masked
    attention turns the rounding of a mask logit near 0 into another view of the image."""
    found: dict[str, float] = {}
    for side in (size, *(round(size * scale) for scale in OTHER_SCALES)):
        inputs = example_inputs(processor_of(name, side), None)
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


def train(model: Any, processor: Any, steps: int, rate: float) -> float:
    """Train on two scenes a step; the mean loss of the last ten steps."""
    scenes = load_scenes("train", length=steps * 2, image_size=(128, 128), task=processor.task)
    collate = Collator(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for step in range(steps):
        batch = collate([scenes.sample(2 * step), scenes.sample(2 * step + 1)])
        loss = model(**{key: batch[key] for key in TRAINED_ON}).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}, loss {losses[-1]:.2f}", flush=True)
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def exported(model: Any, name: str, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return export_model(model, processor_of(name, size), folder).record


def processor_of(name: str, size: int, **labels: Any) -> Any:
    return image_processor_for(preset(name, image_size=[size, size], **labels))


def label_fields() -> dict[str, Any]:
    """The labels of the scenes, as fields of a configuration."""
    spec = scene_label_spec()
    return {"id2label": spec.id2label, "thing_label_ids": list(spec.thing_label_ids)}


def line(found: dict[str, Any]) -> str:
    name = f"{found['preset']} | {found['train_steps']} steps"
    if "error" in found:
        return f"| {name} | {found['error']} | torch's float32 against float64: {found['rounding']} |"
    sizes = "any size" if found["free_size"] else "a file for each size"
    differences = ", ".join(f"{name} {value:.1e}" for name, value in found["largest_difference"].items())
    moved = "".join(f", {name} {value:.1e} in the last digits" for name, value in found[DIFFERENCES[1]].items())
    return f"| {name} | {sizes} | {differences}{moved} | {found['seconds']:.0f} s |"


if __name__ == "__main__":
    main()
