"""`batch_size: auto`: which sizes are tried, when one fits, and that the search leaves no trace in the run."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from hf_maskformer.data.load import load
from hf_maskformer.training import batch_size
from hf_maskformer.training.batch_size import (
    TrialSteps,
    candidates,
    everywhere,
    fullest_images,
    known_batch_size,
    largest_fitting,
    unchanged,
    worst_batch,
)
from hf_maskformer.training.setup import build_model
from hf_maskformer.training.step_memory import DeviceMemory, available_memory, expected_memory
from hf_maskformer.training.train import train

MIB = 2**20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux counts the memory")


@pytest.mark.parametrize(
    ("images_per_step", "processes", "most", "expected"),
    [
        (None, 1, 13, [1, 2, 3, 4, 6, 8, 12]),
        (None, 4, 1, [1]),
        (16, 1, 1024, [1, 2, 4, 8, 16]),
        (24, 2, 1024, [1, 2, 3, 4, 6, 12]),
        (24, 2, 5, [1, 2, 3, 4]),
        (7, 1, 1024, [1, 7]),
    ],
)
def test_the_sizes_that_are_tried(images_per_step, processes, most, expected):
    assert candidates(images_per_step, processes, most=most) == expected


def test_images_that_the_processes_cannot_share_are_refused():
    with pytest.raises(ValueError, match="images_per_step is 9; it must be a multiple of the 2 processes"):
        candidates(9, 2, most=8)


def test_the_last_size_before_the_first_that_does_not_fit():
    tried = []

    def fits(size):
        tried.append(size)
        return size <= 5

    assert largest_fitting([1, 2, 3, 4, 6, 8, 12], fits) == 4
    assert tried == [1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="not even 1 image fits into the memory"):
        largest_fitting([1, 2], lambda size: False)


def test_a_size_fits_only_if_it_fits_on_all_processes():
    def accelerator(fitting_elsewhere):
        def reduce(own, reduction):
            assert reduction == "sum"
            return own + fitting_elsewhere

        return SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)

    assert everywhere(lambda size: True, accelerator(1.0))(4) is True
    assert everywhere(lambda size: True, accelerator(0.0))(4) is False
    assert everywhere(lambda size: False, accelerator(1.0))(4) is False


def test_a_step_that_runs_out_of_memory_does_not_fit_and_another_error_is_one():
    def step(size):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if size == 0:
            raise RuntimeError("shapes do not match")

    fits = DeviceMemory(step, torch.device("cpu"))
    assert [fits(size) for size in (1, 2, 3)] == [True, True, False]
    with pytest.raises(RuntimeError, match="shapes"):
        fits(0)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [([], 0), ([(2, 300)], 1200), ([(1, 100), (2, 150)], 450), ([(1, 9), (2, 200), (4, 240)], 320)],
)
def test_memory_is_extrapolated_from_the_sizes_before(measured, expected):
    assert expected_memory(8, measured) == expected


# Each image takes 32 MiB, and there are 200, of which 15 % are kept: 5 images fit.
STEPS_OF_32_MIB = """
import gc
import torch
from hf_maskformer.training import step_memory

MIB = 2**20
tried = []

def step(size):
    tried.append(size)
    torch.ones(size, 32 * MIB, dtype=torch.uint8)

gc.disable()
step(1)  # what torch itself takes at its first allocation is not an image's
step_memory.available_memory = lambda: 200 * MIB
tried.clear()
fits = step_memory.CpuMemory(step, num_processes=1)
assert [fits(size) for size in (1, 2, 4)] == [True, True, True], fits.measured
assert abs(fits.measured[-1][1] - 128 * MIB) < 12.8 * MIB, fits.measured
assert fits(16) is False
assert tried == [1, 2, 4], tried  # 16 would end the process on a machine that has no more
shared = step_memory.CpuMemory(step, num_processes=4)
assert [shared(size) for size in (1, 2)] == [True, False], shared.measured
"""


@needs_proc
def test_on_a_cpu_the_resident_memory_counts():
    """In a process of its own: what a thousand earlier tests hold is given back at moments of its own choosing."""
    subprocess.run([sys.executable, "-c", STEPS_OF_32_MIB], check=True)


@needs_proc
def test_the_machine_has_some_memory():
    assert 10 * MIB < available_memory() < 2**50


def stored_data(root: Path, rows: list[list[tuple[int, bool]]], task: str):
    """COCO instances: of each image the class and crowd mark of its objects."""
    (root / "train" / "images").mkdir(parents=True)
    annotations, images = [], []
    for number, objects in enumerate(rows):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / "train" / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 16, "width": 16})
        for category, crowd in objects:
            place = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": int(crowd)}
            mask = {"size": [16, 16], "counts": [0, 8, 248]}
            polygon = [[0, 0, 0, 8, 8, 8, 8, 0]]
            annotations.append({**place, "segmentation": mask if crowd else polygon, "bbox": [0, 0, 8, 8], "area": 64})
    table = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (root / "train" / "instances.json").write_text(json.dumps(table))
    return load(str(root), split="train", task=task, cache_dir=str(root / "cache"))


@pytest.mark.parametrize(("task", "expected"), [("instance", [3, 2]), ("semantic", [2, 1])])
def test_the_fullest_images_are_counted_as_the_task_sees_them(tmp_path, task, expected):
    """The one with the most segments has crowds, which no instance is learned from."""
    rows = [[(1, False)], [(1, False), (2, False), (1, True), (1, True)], [(1, False)] * 3]
    assert fullest_images(stored_data(tmp_path, rows, task), 2) == expected


def test_drawn_scenes_are_counted():
    data = load("scenes", task="panoptic", length=6, image_size=64)
    counts = [len(data.sample(index).class_labels) for index in range(6)]
    assert fullest_images(data, 6) == sorted(counts, reverse=True)


def test_the_worst_batch_has_the_fullest_images_and_padding():
    config = SimpleNamespace(num_channels=3, num_labels=4)
    batch = worst_batch(3, [6, 5], (8, 12), config, torch.device("cpu"))
    assert batch["pixel_values"].shape == (3, 3, 8, 12)
    assert [len(masks) for masks in batch["mask_labels"]] == [6, 5, 5]
    assert batch["class_labels"][0].tolist() == [0, 1, 2, 3, 0, 1]
    assert (batch["pixel_mask"] == 0).any()


def test_a_trial_with_fixed_matching_has_no_class_twice(tiny_run, monkeypatch):
    """Streamed data is not counted, so there are as many targets as queries: more than classes."""
    monkeypatch.setattr(batch_size, "fullest_images", lambda data, most: [])
    overrides = {**tiny_run().config_overrides, "matcher": "fixed"}
    config = tiny_run(task="semantic", config_overrides=overrides)
    data = load("scenes", task="semantic", length=1, image_size=64)
    model, processor = build_model(config, data, None)
    assert model.config.num_labels < model.config.num_queries
    accelerator = Accelerator(cpu=True)
    with unchanged(model, accelerator.device):
        step = TrialSteps(config, model, processor, data, accelerator, most=1)
        assert step.counts == [model.config.num_labels]
        step(1)


def test_a_trial_is_a_real_step_and_leaves_everything_as_it_was(tiny_run):
    config = tiny_run(ema_decay=0.9, copy_paste_probability=0.5)
    data = load("scenes", length=4, image_size=64)
    model, processor = build_model(config, data, None)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    accelerator = Accelerator(cpu=True)
    with unchanged(model, accelerator.device):
        step = TrialSteps(config, model, processor, data, accelerator, most=4)
        assert step.canvas == (64, 64)
        assert step.counts == [2 * count for count in fullest_images(data, 4)]
        step(2)
        assert model.training
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        random.random(), np.random.rand()
    assert not any(module.training for module in model.modules())
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def two_fit(monkeypatch):
    """Two images of the run fit, found by steps that are really run."""
    sizes = []

    def memory_check(step, accelerator):
        def fits(size):
            sizes.append(size)
            step(size)
            return size <= 2

        return fits

    monkeypatch.setattr(batch_size, "memory_check", memory_check)
    return sizes


def test_an_automatic_run_is_the_run_with_the_number_given(tiny_run, tmp_path, monkeypatch, caplog):
    tried = two_fit(monkeypatch)
    caplog.set_level("INFO")
    train(tiny_run("auto", batch_size="auto", images_per_step=4, val_split=None))
    assert tried == [1, 2, 4]
    assert "batch_size auto: 2 images fit into the memory of a process; 1 processes and 2 accum" in caplog.text
    stored = json.loads((tmp_path / "auto" / "train_config.json").read_text())
    assert (stored["batch_size"], stored["gradient_accumulation_steps"]) == (2, 2)
    train(tiny_run("given", batch_size=2, gradient_accumulation_steps=2, val_split=None))
    expected, found = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("given", "auto"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    again = tiny_run("auto", batch_size="auto", images_per_step=4, val_split=None, max_steps=5, resume=True)
    again.schedule = "poly"
    assert train(again)["steps"] == 5
    assert tried == [1, 2, 4]  # the number is not looked for again
    assert json.loads((tmp_path / "auto" / "train_config.json").read_text())["batch_size"] == 2


def test_images_per_step_become_accumulation_steps(tiny_run):
    accelerator = Accelerator(cpu=True)
    config = known_batch_size(tiny_run(batch_size=2, images_per_step=6), accelerator)
    assert config.gradient_accumulation_steps == accelerator.gradient_accumulation_steps == 3
    with pytest.raises(
        ValueError, match=r"images_per_step is 7, but 1 processes with batch_size 2 take 2 images at a"
    ):
        known_batch_size(tiny_run(batch_size=2, images_per_step=7), accelerator)
    assert known_batch_size(config, accelerator) == config  # as it is stored
    for size in (2, "auto"):
        both = tiny_run(batch_size=size, images_per_step=6, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2, but images_per_step 6"):
            known_batch_size(both, accelerator)
