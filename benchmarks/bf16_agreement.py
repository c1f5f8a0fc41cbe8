"""What bf16 changes in the semantic maps of a trained model: the share of pixels with another label, and the mIoU.

    python benchmarks/bf16_agreement.py CHECKPOINT --dataset DIR [--split val] [--limit N]

Every image of the split is predicted in float32 and by a copy that `optimize_for_inference(dtype=torch.bfloat16)` made
of the model, one at a time, to maps of the image's own size.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import machine
from training_rows import commit_of

from hf_maskformer.data.load import load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.inference.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
LEAST_EQUAL = 0.995  # of all pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="first images only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/bf16_agreement.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_checkpoint(arguments.checkpoint)
    narrow = load_checkpoint(arguments.checkpoint)[0].optimize_for_inference(dtype=torch.bfloat16)
    data = load(arguments.dataset, split=arguments.split, task="semantic")
    count = min(len(data), arguments.limit or len(data))
    equal, pixels = 0, 0
    for index in range(count):
        image = data.sample(index).image
        maps = [semantic_map(one, processor, image) for one in (model, narrow)]
        equal += int((maps[0] == maps[1]).sum())
        pixels += maps[0].numel()
    report = {
        "parameters": model.num_parameters(),
        "data": Path(arguments.dataset).name,
        "split": arguments.split,
        "images": count,
        "pixels": pixels,
        "equal": equal / pixels,
        "least_equal": LEAST_EQUAL,
        "mean_iou": evaluate(model, processor, data, limit=count)["mean_iou"],
        "mean_iou_bf16": evaluate(narrow, processor, data, limit=count)["mean_iou"],
        "hardware": machine(),
        "torch": torch.__version__,
        "commit": commit_of(ROOT),
    }
    print(json.dumps(report, indent=2))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


@torch.inference_mode()
def semantic_map(model: Any, processor: Any, image: Any) -> torch.Tensor:
    inputs = processor(images=[image], return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(model.dtype), pixel_mask=inputs["pixel_mask"])
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])[0]


if __name__ == "__main__":
    main()
