"""Ours and transformers' own MaskFormer, trained for the same number of minutes on the same augmented images.

    python benchmarks/train_compare.py --data DIR --minutes 20 --models ours peer

The peer is `transformers.MaskFormerForInstanceSegmentation` as a plain user would build it: the same backbone
configuration with random weights, the library's default decoder and loss, AdamW, and its own
`post_process_semantic_segmentation`. Its images are stretched to the canvas, so that no padding reaches its
post-processing. Both are evaluated on the validation split at the images' original size with the same MeanIoU.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

from hf_maskformer.data.load import SegmentationData
from hf_maskformer.evaluation.semantic import MeanIoU
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training.config import TrainConfig, train_config
from hf_maskformer.training.optimizer import learning_rate_factor
from hf_maskformer.training.setup import load_splits
from hf_maskformer.training.trackers import json_ready, scalars
from hf_maskformer.training.train import model_inputs, open_batches, train

PEER_LEARNING_RATE = 2e-4
# What may differ between our finished run and the settings of the comparison: where it lies and what it reported.
NOT_COMPARED = {
    "output_dir",
    "dataset",
    "resume",
    "evaluations",
    "eval_limit",
    "eval_batch_size",
    "log_every",
    "num_samples",
    "checkpoint_every",
    "keep_checkpoints",
}
RESULTS = Path(__file__).resolve().parent / "results" / "train_compare.json"


def main() -> None:
    arguments = parse_arguments()
    flags = {
        "dataset": arguments.data,
        "task": "semantic",
        "output_dir": arguments.output_dir,
        "max_minutes": arguments.minutes,
        "seed": arguments.seed,
        "evaluations": 1,
    }
    if arguments.preset is not None:
        flags["preset"] = arguments.preset
    config = train_config(arguments.recipe, flags)
    rows = []
    for name in arguments.models:
        torch.set_num_threads(arguments.threads)
        row = train_peer(config) if name == "peer" else ours_row(config, arguments.run)
        rows.append({"model": name, **row})
        print(json.dumps(rows[-1], indent=2))
    report = {"machine": machine(arguments.threads), "data": Path(arguments.data).name, "seed": config.seed}
    write_rows(arguments.json, {**report, "preset": config.preset, "minutes": config.max_minutes}, rows)
    print(f"{'model':8} {'mIoU':>7} {'steps':>7} {'minutes':>8} {'parameters':>11}")
    for row in rows:
        numbers = f"{row['mean_iou']:7.4f} {row['steps']:7d} {row['training_minutes']:8.2f} {row['parameters']:11,}"
        print(f"{row['model']:8} {numbers}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of semantic maps with a train and a val split")
    parser.add_argument("--minutes", type=float, required=True, help="training time of each model")
    parser.add_argument("--models", nargs="+", choices=["ours", "peer"], default=["ours", "peer"])
    parser.add_argument("--recipe", default=str(Path(__file__).resolve().parent.parent / "recipes" / "camvid.yaml"))
    parser.add_argument("--preset", help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output-dir", default="runs/train_compare", help="where our run goes")
    parser.add_argument(
        "--run", type=Path, help="take ours from this finished `hf-maskformer train` run of the recipe"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def ours_row(config: TrainConfig, run: Path | None) -> dict[str, Any]:
    """Train ours, or read a run that was trained with the same settings.

    Raises:
        ValueError: The run was trained with other settings.
    """
    if run is None:
        metrics, folder = train(config), Path(config.output_dir)
    else:
        metrics, folder = json.loads((run / "metrics.json").read_text()), run
        used = json.loads((run / "train_config.json").read_text())
        wanted = json_ready(vars(config))
        for name in sorted(set(wanted) - NOT_COMPARED):
            if used.get(name) != wanted[name]:
                raise ValueError(f"{run} was trained with {name} = {used.get(name)!r}, wanted is {wanted[name]!r}")
    weights = folder / "final"
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(weights)
    return {**scalars(metrics), "parameters": model.num_parameters()}


def train_peer(config: TrainConfig) -> dict[str, Any]:
    """The same images in the same order for the same time; the optimizer steps of transformers' own model."""
    train_data, val_data = load_splits(config)
    if val_data is None:
        raise ValueError("val_split is none; the comparison needs a validation split")
    spec = train_data.label_spec
    ours = preset(config.preset, id2label=spec.id2label, task="semantic", **config.config_overrides)
    set_seed(config.seed)
    peer_config = MaskFormerConfig(backbone_config=ours.backbone_config, id2label=spec.id2label)
    model = MaskFormerForInstanceSegmentation(peer_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEER_LEARNING_RATE)
    batches = open_batches(config, train_data, image_processor_for(ours), Accelerator(), first_step=0)
    budget = 60.0 * (config.max_minutes or 0.0)
    seconds, steps = 0.0, 0
    model.train()
    with tqdm(total=round(budget), unit="s", desc="train peer") as bar:
        while seconds < budget:
            started = time.perf_counter()
            factor = learning_rate_factor("poly", step=steps, progress=seconds / budget, warmup_steps=0)
            for group in optimizer.param_groups:
                group["lr"] = PEER_LEARNING_RATE * factor
            inputs = model_inputs(next(batches))
            inputs["mask_labels"] = [masks.float() for masks in inputs["mask_labels"]]
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            seconds += time.perf_counter() - started
            bar.set_postfix(step=steps, loss=f"{loss.item():.3f}", refresh=False)
            bar.update(min(round(seconds), round(budget)) - bar.n)
    height, width = ours.image_size
    metrics = evaluate_peer(model, val_data, {"height": height, "width": width})
    return {
        **scalars(metrics),
        "steps": steps,
        "training_minutes": seconds / 60.0,
        "parameters": model.num_parameters(),
        "learning_rate": PEER_LEARNING_RATE,
    }


def evaluate_peer(
    model: MaskFormerForInstanceSegmentation, data: SegmentationData, size: dict[str, int]
) -> dict[str, Any]:
    """MeanIoU at original size, of the prediction that transformers' own processor makes."""
    processor = MaskFormerImageProcessor(size=size, ignore_index=data.label_spec.ignore_index)
    metric = MeanIoU(data.label_spec.num_labels, data.label_spec.ignore_index)
    model.eval()
    for index in tqdm(range(len(data)), desc="evaluate peer"):
        image = data.sample(index).image
        inputs = processor(images=[image], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        metric.update([maps[0].numpy()], [data.reference(index)])
    return metric.compute()


def machine(threads: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"device": device, "architecture": platform.machine(), "threads": threads, **versions}


def write_rows(path: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the report; rows of models that were not run now are kept if everything else about them is the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.is_file():
        earlier = json.loads(path.read_text())
        if {key: earlier.get(key) for key in report} == json_ready(report):
            kept = [row for row in earlier["rows"] if row["model"] not in {new["model"] for new in rows}]
    path.write_text(json.dumps(json_ready({**report, "rows": kept + rows}), indent=2) + "\n")


if __name__ == "__main__":
    main()
