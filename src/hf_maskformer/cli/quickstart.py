"""train the light preset on built-in drawn scenes, evaluate it, reload it through pipeline("image-segmentation")

hf-maskformer quickstart
"""

import json
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hf_maskformer.training.config import CONFIG_FILE, TrainConfig

IMAGE_SIZE = 128
NUM_TEST_SCENES = 100
NUM_DRAWN = 6
DEFAULT_MINUTES = 7.0
MIN_PQ = 0.50  # a run of DEFAULT_MINUTES that stays below it has gone wrong
PRESET = "maskformer-light-anchored"
NUM_QUERIES = 40  # a scene holds about a dozen segments
MARKER = ".quickstart"  # this file says that a folder's run is a quickstart's, which the next one may replace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output-dir", default="runs/quickstart")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="training time (default: 7, enough on 2 CPU cores)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: Namespace) -> None:
    output = Path(arguments.output_dir)
    clear(output)
    from hf_maskformer.data.load import load
    from hf_maskformer.evaluation.evaluate import evaluate
    from hf_maskformer.evaluation.json_format import write_json
    from hf_maskformer.evaluation.table import format_table
    from hf_maskformer.inference.checkpoint import load_checkpoint
    from hf_maskformer.training.train import train

    print(f"training for {arguments.minutes:g} minutes ...")
    trained = train(training_config(output, arguments.minutes, arguments.seed))

    unseen = load("scenes", split="test", task="panoptic", length=NUM_TEST_SCENES, image_size=IMAGE_SIZE)
    model, processor = load_checkpoint(output / "final")
    metrics = evaluate(model, processor, unseen)
    run_facts = {name: trained[name] for name in ("steps", "training_minutes", "seed")}
    picture, num_drawn = overlay(output / "final", unseen)
    picture.save(output / "overlay.png")
    facts = {**run_facts, "images": NUM_TEST_SCENES, "segments_drawn": num_drawn, "machine": machine()}
    write_json(output / "metrics.json", {**metrics, **facts})
    print(format_table(metrics, unseen.label_spec.id2label))

    print(f"\n{NUM_TEST_SCENES} unseen scenes: mIoU {metrics['mean_iou']:.3f}, PQ {metrics['pq']:.3f}, ", end="")
    print(f"mask AP {metrics['map']:.3f}")
    print(f"model: {output / 'final'}   picture: {output / 'overlay.png'}")
    check_quality(metrics["pq"], arguments.minutes)


def clear(output: Path) -> None:
    """Delete the run of an earlier quickstart, because a quickstart always starts anew, and mark the folder as ours.

    Raises:
        ValueError: the folder holds another run.
    """
    parts = [output / name for name in ("checkpoints", "best", "final")]
    stored = output / CONFIG_FILE
    if stored.is_file() or any(path.exists() for path in parts):
        try:
            config = json.loads(stored.read_text())
        except (OSError, ValueError):
            config = {}
        ours = (config.get("dataset"), config.get("preset")) == ("scenes", PRESET) and (output / MARKER).is_file()
        if not ours:
            raise ValueError(f"{output} holds a run that is not a quickstart's; choose another --output-dir")
    for path in parts:
        shutil.rmtree(path, ignore_errors=True)
    stored.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def check_quality(quality: float, minutes: float) -> None:
    """End with exit code 1 where a run of the default length or longer has not learned the scenes."""
    if minutes >= DEFAULT_MINUTES and not quality >= MIN_PQ:
        raise SystemExit(
            f"error: PQ {quality:.3f} is below the {MIN_PQ:.2f} that {minutes:g} minutes reach on 2 CPU cores; "
            f"a slower or busy machine needs more --minutes"
        )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    import torch

    return {"device": f"{os.cpu_count()} CPU cores", "threads": torch.get_num_threads()}


def training_config(output: Path, minutes: float, seed: int) -> TrainConfig:
    """What recipes/scenes.yaml says, with a budget in minutes (an installed package has no recipes folder)."""
    return TrainConfig(
        preset=PRESET,
        dataset="scenes",
        task="panoptic",
        output_dir=str(output),
        dataset_options={"length": 2000, "image_size": IMAGE_SIZE},
        val_split=None,  # scenes of the test split, which no choice was made on, are evaluated afterwards
        config_overrides={"image_size": [IMAGE_SIZE, IMAGE_SIZE], "num_queries": NUM_QUERIES},
        max_minutes=minutes,
        learning_rate=1e-3,
        backbone_learning_rate_multiplier=1.0,
        weight_decay=0.01,
        warmup_steps=50,
        max_grad_norm=1.0,
        scale_range=(0.8, 1.25),
        seed=seed,
    )


def overlay(model: Path, data: Any) -> tuple[Any, int]:
    """Rows of image, truth and prediction, and the number of segments predicted.

    The prediction is what the stock transformers pipeline makes of `model`.
    """
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
    num_segments = 0
    for index in spread_indices(len(data), NUM_DRAWN):
        image = data.sample(index).image
        ids = np.zeros(image.shape[:2], dtype=np.int32)
        segments = []
        for number, found in enumerate(segment(Image.fromarray(image)), start=1):
            ids[np.asarray(found["mask"]) > 0] = number
            segments.append({"id": number, "label_id": label2id[found["label"]], "score": found["score"]})
        num_segments += len(segments)
        truth = reference_segments(data.reference(index), data.task, spec, image.shape[:2])
        panels += [
            image,
            draw_segments(image, *truth, spec.id2label, color_by="label"),
            draw_segments(image, ids, segments, spec.id2label, color_by="label"),
        ]
    titles = ["image", "truth", "prediction"] * (len(panels) // 3)
    return contact_sheet(panels, columns=6, titles=titles), num_segments
