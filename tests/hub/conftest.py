"""A finished run as training leaves it, made by hand: its numbers are known, its model is small."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.presets import image_processor_for
from hf_maskformer.training.config import TrainConfig
from hub.stand_in import stand_in_of_the_hub
from model import variant_tester as tester

LABELS = {0: "sky", 1: "grass", 2: "crate | box"}
METRICS = {
    "mean_iou": 0.51234,
    "overall_accuracy": 0.75,
    "mean_accuracy": None,
    "per_category_iou": [0.9, None, 0.05],
    "per_category_accuracy": [0.95, None, 0.1],
    "steps": 40,
    "training_minutes": 1.25,
    "best_step": 40,
    "best_value": 0.51234,
    "seed": 3,
    "hardware": "1 x Test GPU",
    "images_per_second": 12.5,
    "peak_memory_mib": 2048.0,
    "peak_memory_of": "cuda",
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the Hub that this process is logged in to."""
    with stand_in_of_the_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder; keywords change its training options or, as `metrics`, its metrics."""

    def make(name="run", *, metrics=None, **changes):
        run = tmp_path / name
        config = tester.tiny("maskformer-light", task="semantic", id2label=LABELS, thing_label_ids=[])
        tester.build(config).save_pretrained(run / "best")
        image_processor_for(config).save_pretrained(run / "best")
        options = {"dataset": str(tmp_path / "private" / "fields"), "output_dir": str(run), "max_steps": 40, "seed": 3}
        fields = TrainConfig(**{**options, **changes}).to_dict()
        (run / "train_config.json").write_text(json.dumps(fields))
        (run / "metrics.json").write_text(json.dumps({**METRICS, **(metrics or {})}))
        Image.new("RGB", (20, 10)).save(run / "training_curves.png")
        (run / "samples").mkdir()
        for step in (20, 40):
            pixels = np.full((8, 24, 3), step, dtype=np.uint8)
            Image.fromarray(pixels).save(run / "samples" / f"step-{step:08d}.png")
        return run

    return make
