"""transformers' stock pipeline on a saved directory: no question, no warning, our task and thresholds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_maskformer.presets import image_processor_for
from model import variant_tester as tester

# Runs in a fresh interpreter, as a user would: whatever asks, warns or reaches for the network shows in its output.
SCRIPT = """
import builtins, json, logging, sys
from transformers.utils import logging as transformers_logging

def refuse(*args):
    raise AssertionError(f"asked on stdin: {args}")

builtins.input = refuse
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")
for name in ("", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Keep(level=logging.WARNING))

import hf_maskformer
from PIL import Image
from transformers import pipeline

images = [Image.new("RGB", (50, 30), "red"), Image.new("L", (33, 47), 90), Image.new("RGB", (64, 64), "blue")]
sizes, modules = [], set()
for folder in sys.argv[1:]:
    segment = pipeline("image-segmentation", model=folder, device="cpu")
    modules |= {type(segment.model).__module__, type(segment.image_processor).__module__}
    sizes.append([[part["mask"].size for part in segments] for segments in segment(images, batch_size=2)])
print(json.dumps({"lines": lines, "modules": sorted(modules), "sizes": sizes}))
"""


def save(folder: Path, task: str, **settings) -> Path:
    """A tiny model with random weights and its image processor."""
    config = tester.tiny("maskformer-light", task=task, thing_label_ids=[2] if task != "semantic" else [], **settings)
    model = tester.build(config)
    with torch.no_grad():
        model.model.class_head.projection.bias[-1] = -5  # random weights must find something
    model.save_pretrained(folder)
    image_processor_for(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved model for each task, with a threshold that random weights pass."""
    root = tmp_path_factory.mktemp("models")
    settings = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    return {task: save(root / task, task, **settings) for task in ("semantic", "instance", "panoptic")}


@pytest.fixture(scope="module")
def images():
    """Different sizes, and a greyscale picture among them."""
    pixels = np.random.default_rng(0)
    colour = Image.fromarray(pixels.integers(0, 256, (40, 70, 3), dtype=np.uint8))
    tall = Image.fromarray(pixels.integers(0, 256, (90, 33, 3), dtype=np.uint8))
    grey = Image.fromarray(pixels.integers(0, 256, (57, 64), dtype=np.uint8), mode="L")
    return [colour, tall, grey]


def load(folder: Path, **settings):
    return pipeline("image-segmentation", model=str(folder), device="cpu", **settings)


def assert_segments(results, images):
    assert len(results) == len(images)
    for segments, image in zip(results, images, strict=True):
        assert segments
        for segment in segments:
            assert set(segment) == {"label", "score", "mask"}
            assert segment["label"] in tester.LABELS.values()
            assert segment["mask"].size == image.size
            assert set(np.unique(segment["mask"])) <= {0, 255}


def test_a_fresh_process_asks_nothing_and_warns_of_nothing(folders):
    """Every task, mixed sizes with greyscale, batch_size=2: no log line, no Python warning, no question."""
    command = [sys.executable, "-W", "always::UserWarning", "-c", SCRIPT, *map(str, folders.values())]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False, env=quiet
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["lines"] == []
    assert done.stderr.strip() == ""
    assert report["modules"] == [
        "hf_maskformer.model.image_processing_hf_maskformer",
        "hf_maskformer.model.modeling_hf_maskformer",
    ]
    for per_task in report["sizes"]:
        for segments, size in zip(per_task, ([50, 30], [33, 47], [64, 64]), strict=True):
            assert segments
            assert all(found == size for found in segments)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_mixed_sizes_and_greyscale_in_one_call(folders, images, task):
    results = load(folders[task])(images)
    assert_segments(results, images)
    scores = [segment["score"] for segments in results for segment in segments]
    assert all((score is None) == (task == "semantic") for score in scores)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_default_task_is_the_processors(folders, images, monkeypatch, task):
    segment = load(folders[task])
    called = []

    def recorded(name, method):
        return lambda *args, **kwargs: called.append(name) or method(*args, **kwargs)

    for name in ("semantic", "instance", "panoptic"):
        method = getattr(segment.image_processor, f"post_process_{name}_segmentation", None)
        if method is not None:  # the methods of other tasks are hidden
            monkeypatch.setattr(
                segment.image_processor, f"post_process_{name}_segmentation", recorded(name, method), raising=False
            )
    segment(images[0])
    assert called == [task]


def test_things_and_stuff_of_a_panoptic_result_do_not_overlap(folders, images):
    for segments, image in zip(load(folders["panoptic"])(images), images, strict=True):
        covered = sum(np.asarray(segment["mask"], dtype=np.int64) // 255 for segment in segments)
        assert covered.shape == image.size[::-1]
        assert covered.max() <= 1


def test_batches_give_what_single_images_give(folders, images):
    segment = load(folders["panoptic"])
    single = segment(images)
    batched = segment(images, batch_size=2)
    for one, other in zip(single, batched, strict=True):
        assert [part["label"] for part in one] == [part["label"] for part in other]
        for left, right in zip(one, other, strict=True):
            assert left["score"] == pytest.approx(right["score"], abs=1e-5)
            differing = np.asarray(left["mask"]) != np.asarray(right["mask"])
            assert differing.mean() < 0.01


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_the_stored_thresholds_count_and_not_the_pipelines(folders, images, tmp_path, task):
    """Random weights never reach the pipeline's own 0.9."""
    kept = load(folders[task])(images[0])
    assert kept
    assert max(segment["score"] for segment in kept) < 0.9
    strict = save(tmp_path / "strict", task, threshold=0.95, mask_threshold=0.0, overlap_mask_area_threshold=0.0)
    assert load(strict)(images[0]) == []


def test_a_threshold_of_the_caller_counts(folders, images):
    segment = load(folders["instance"])
    scores = sorted(part["score"] for part in segment(images[0]))
    limit = scores[-1]
    kept = segment(images[0], threshold=limit - 1e-4)
    assert [part["score"] for part in kept] == pytest.approx([limit])


def test_another_subtask_can_be_asked_of_a_panoptic_model(folders, images):
    segment = load(folders["panoptic"])
    assert all(part["score"] is None for part in segment(images[0], subtask="semantic"))


@pytest.mark.parametrize(
    "settings",
    [
        {"device_map": "cpu"},
        {"model_kwargs": {"low_cpu_mem_usage": True, "use_safetensors": True, "ignore_mismatched_sizes": True}},
        {"model_kwargs": {"offload_folder": "off", "offload_buffers": False, "max_memory": {"cpu": "1GB"}}},
        {"model_kwargs": {"variant": None, "weights_only": True, "key_mapping": None, "mirror": None}},
    ],
)
def test_settings_of_loading_ask_nothing(folders, images, monkeypatch, settings):
    asked = []  # an exception here would be caught and hidden

    def refuse(*args):
        asked.append(args)
        raise AssertionError(f"asked on stdin: {args}")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(sys, "stdin", None)
    segment = pipeline("image-segmentation", model=str(folders["panoptic"]), **settings)
    assert not asked
    assert_segments([segment(images[0])], images[:1])


def test_a_file_path_and_bfloat16(folders, images, tmp_path):
    path = tmp_path / "image.png"
    images[0].save(path)
    assert_segments([load(folders["panoptic"], dtype=torch.bfloat16)(str(path))], images[:1])
