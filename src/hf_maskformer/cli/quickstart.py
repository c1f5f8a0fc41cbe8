"""train the light preset on built-in drawn scenes, evaluate it, reload it through pipeline("image-segmentation")

hf-maskformer quickstart
"""

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hf_maskformer.training.config import TrainConfig

IMAGE_SIZE = 128
NUM_TEST_SCENES = 100
NUM_DRAWN = 6


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output-dir", default="runs/quickstart")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time (default: 7, enough on 2 CPU cores)")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: Namespace) -> None:
    output = Path(arguments.output_dir)
    # A quickstart always starts anew; without its checkpoints the folder no longer counts as a run to resume.
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    from hf_maskformer.cli.evaluate import write_json
    from hf_maskformer.data.load import load
    from hf_maskformer.evaluation.evaluate import evaluate
    from hf_maskformer.evaluation.table import format_table
    from hf_maskformer.inference.checkpoint import load_checkpoint
    from hf_maskformer.training.train import train

    print(f"training for {arguments.minutes:g} minutes ...")
    trained = train(training_config(output, arguments.minutes, arguments.seed))

    unseen = load("scenes", split="test", task="panoptic", length=NUM_TEST_SCENES, image_size=IMAGE_SIZE)
    model, processor = load_checkpoint(output / "final")
    metrics = evaluate(model, processor, unseen)
    run_facts = {name: trained[name] for name in ("steps", "training_minutes", "seed")}
    write_json(output / "metrics.json", {**metrics, **run_facts, "images": NUM_TEST_SCENES, "machine": machine()})
    print(format_table(metrics, unseen.label_spec.id2label))

    overlay(output / "final", unseen).save(output / "overlay.png")
    print(f"\n{NUM_TEST_SCENES} unseen scenes: mIoU {metrics['mean_iou']:.3f}, PQ {metrics['pq']:.3f}, ", end="")
    print(f"mask AP {metrics['map']:.3f}")
    print(f"model: {output / 'final'}   picture: {output / 'overlay.png'}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    import torch

    return {"device": f"{os.cpu_count()} CPU cores", "threads": torch.get_num_threads()}


def training_config(output: Path, minutes: float, seed: int) -> TrainConfig:
    """What recipes/scenes.yaml says, with a budget in minutes (an installed package has no recipes folder)."""
    return TrainConfig(
        preset="maskformer-light",
        dataset="scenes",
        task="panoptic",
        output_dir=str(output),
        dataset_options={"length": 2000, "image_size": IMAGE_SIZE},
        val_split=None,  # scenes of the test split, which no choice was made on, are evaluated afterwards
        config_overrides={"image_size": [IMAGE_SIZE, IMAGE_SIZE]},
        max_minutes=minutes,
        learning_rate=1e-3,
        backbone_learning_rate_multiplier=1.0,
        weight_decay=0.01,
        warmup_steps=50,
        max_grad_norm=1.0,
        scale_range=(0.8, 1.25),
        seed=seed,
    )


def overlay(model: Path, data: Any) -> Any:
    """Rows of image, truth and prediction; the prediction is what the stock transformers pipeline makes of `model`."""
    import numpy as np
    from PIL import Image
    from transformers import pipeline

    import hf_maskformer  # noqa: F401  (registers the Auto classes)
    from hf_maskformer.training.samples import reference_segments, spread_indices
    from hf_maskformer.visualize import contact_sheet, draw_segments

    spec = data.label_spec
    label2id = {name: label_id for label_id, name in spec.id2label.items()}
    segment = pipeline("image-segmentation", model=str(model))
    panels = []
    for index in spread_indices(len(data), NUM_DRAWN):
        image = data.sample(index).image
        ids = np.zeros(image.shape[:2], dtype=np.int32)
        segments = []
        for number, found in enumerate(segment(Image.fromarray(image)), start=1):
            ids[np.asarray(found["mask"]) > 0] = number
            segments.append({"id": number, "label_id": label2id[found["label"]], "score": found["score"]})
        truth = reference_segments(data.reference(index), data.task, spec)
        panels += [
            image,
            draw_segments(image, *truth, spec.id2label, color_by="label"),
            draw_segments(image, ids, segments, spec.id2label, color_by="label"),
        ]
    titles = ["image", "truth", "prediction"] * (len(panels) // 3)
    return contact_sheet(panels, columns=3, titles=titles)
