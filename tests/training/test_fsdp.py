"""Sharded training (FSDP) with real processes: the same weights as one process, and one checkpoint for everyone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.training.checkpoint import load_state, newest_checkpoint
from hf_maskformer.training.failure import read_part
from hf_maskformer.training.shards import LAUNCH_VARIABLE, OFFLOAD_VARIABLE, shards_wanted
from hf_maskformer.training.train import train

pytestmark = pytest.mark.slow  # pairs of processes: half a minute each on one core

# Ten SGD steps in float64 with the model and the images of tests/model/distributed_worker.py; argv: out, accumulation.
SGD_RUN = """
import sys
import torch
from accelerate import Accelerator
from model.distributed_worker import IMAGES, STEPS, build_model, collate, image
from safetensors.torch import save_file
from hf_maskformer.training.shards import shard_model, whole_tensors
from hf_maskformer.training.step import training_step

torch.set_num_threads(1)
accumulation, factor = int(sys.argv[2]), float(sys.argv[3])
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
model = build_model()
sharded = accelerator.num_processes > 1
if sharded:
    shard_model(model, accelerator)
honest = model.loss_normalizer
model.loss_normalizer = lambda *args, **keywords: honest(*args, **keywords) / factor
optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.05))
model.train()
share = IMAGES // (accelerator.num_processes * accumulation)
first = accelerator.process_index * IMAGES // accelerator.num_processes
saved, losses = {}, []
for step in range(STEPS):
    window = [collate([image(step, first + part * share + i) for i in range(share)]) for part in range(accumulation)]
    values = training_step(accelerator, model, optimizer, window, step=step, max_grad_norm=0.5)
    losses.append([values["loss"], values["grad_norm"]])
    if step in (0, STEPS - 1):
        weights = whole_tensors(model.state_dict().items(), keep=True)
        saved |= {f"{step}.{name}": value.clone() for name, value in weights.items()}
if accelerator.is_main_process:
    save_file({**saved, "losses": torch.tensor(losses, dtype=torch.float64)}, sys.argv[1])
"""
NOISE = {"rtol": 1e-4, "atol": 2e-5}  # float32, other orders of adding up


def tensors(config, name="final/model.safetensors"):
    return load_file(Path(config.output_dir) / name)


def log_lines(config):
    return [json.loads(line) for line in Path(config.output_dir, "log.jsonl").read_text().splitlines()]


def assert_close(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def frozen_norms(tiny_run):
    """The tiny run without what depends on how a step's images are spread: batch statistics."""

    def make(name, **changes):
        overrides = {**tiny_run().config_overrides, "backbone_freeze_batch_norm": True}
        return tiny_run(name, **{"config_overrides": overrides, "max_grad_norm": 0.1, **changes})

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ten_steps_of_sgd_in_float64_are_those_of_one_process(in_processes, tmp_path, project_root, accumulation):
    """Clipped, so that the norm over all shards counts too; a loss times two is noticed."""
    found = {}
    for name, processes, parts, factor in (
        ("one", 1, 1, 1.0),
        ("sharded", 2, accumulation, 1.0),
        ("doubled", 2, 1, 2.0),
    ):
        out = tmp_path / name
        paths = f"{project_root / 'tests'}"
        results = in_processes(SGD_RUN, str(out), str(parts), str(factor), processes=processes, PYTHONPATH=paths)
        assert {one.code for one in results} == {0}, results[0].errors
        found[name] = load_file(out)
    assert_close(found["sharded"], found["one"], rtol=0, atol=1e-9)
    assert (found["doubled"]["losses"] - found["one"]["losses"]).abs().max() > 0.1


def test_a_sharded_run_writes_what_a_run_with_ddp_writes(frozen_norms, train_in_processes):
    ddp = frozen_norms("ddp", ema_decay=0.9, max_steps=2)
    sharded = frozen_norms("sharded", ema_decay=0.9, max_steps=2, fsdp=True)
    for config in (ddp, sharded):
        train_in_processes(config)
    files = [[path.relative_to(c.output_dir) for path in Path(c.output_dir).rglob("*")] for c in (ddp, sharded)]
    assert sorted(files[0]) == sorted(files[1])
    checkpoint = "checkpoints/step-00000002"
    for name in (
        "best/model",
        "final/model",
        *(f"{checkpoint}/{part}" for part in ("model/model", "ema", "optimizer")),
    ):
        assert_close(tensors(sharded, f"{name}.safetensors"), tensors(ddp, f"{name}.safetensors"), **NOISE)
    for one, other in zip(log_lines(sharded), log_lines(ddp), strict=True):
        for name in ("loss", "loss_mask/layer_0", "grad_norm", "pq"):
            assert (name in one) == (name in other)
            assert name not in one or one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)
    for folder in ("best", "final", f"{checkpoint}/model"):
        model, _ = load_checkpoint(Path(sharded.output_dir) / folder)
        assert model.config.architectures == ["HfMaskFormerForUniversalSegmentation"]


def test_a_sharded_run_is_resumed_by_two_processes_and_by_one(frozen_norms, train_in_processes):
    options = {"ema_decay": 0.9, "schedule": "constant", "val_split": None}
    whole, cut = (frozen_norms(name, **options, fsdp=True) for name in ("whole", "cut"))
    train_in_processes(whole)
    cut.max_steps = 2
    train_in_processes(cut)
    alone = frozen_norms("alone", **options)
    shutil.copytree(cut.output_dir, alone.output_dir)
    cut.max_steps, cut.resume = 4, True
    train_in_processes(cut)
    for name in ("final/model", "checkpoints/step-00000004/ema", "checkpoints/step-00000004/optimizer"):
        assert_close(tensors(cut, f"{name}.safetensors"), tensors(whole, f"{name}.safetensors"), rtol=1e-6, atol=1e-7)
    alone.max_steps, alone.resume = 3, True
    assert train(alone)["steps"] == 3
    back = frozen_norms("alone", **options, fsdp=True)
    back.resume = True
    train_in_processes(back)
    assert load_state(newest_checkpoint(Path(back.output_dir) / "checkpoints"))["num_processes"] == 2


def test_a_sharded_run_leaves_a_bad_step_out(frozen_norms, train_with_a_bad_image, tmp_path):
    """A bad image on the second process, in the last of two accumulated passes; then the run goes on."""
    config = frozen_norms("run", on_nonfinite="skip", gradient_accumulation_steps=2, max_steps=3, val_split=None)
    config.fsdp, config.checkpoint_every = True, 1
    results = train_with_a_bad_image(config, 3)
    assert [(one.code, one.out.strip()) for one in results] == [(0, "3"), (0, "3")], results[1].errors
    folder = tmp_path / "run" / "failures" / "step-00000001"
    assert sorted(path.name for path in folder.iterdir()) == ["model", "process-0", "process-1"]
    assert len(read_part(folder / "process-1")[1]["terms"]) == 1
    before, after = (tensors(config, f"checkpoints/step-0000000{n}/model/model.safetensors") for n in (2, 3))
    skipped = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_one_process_has_nothing_to_divide(tiny_run):
    with pytest.raises(ValueError, match="fsdp needs more than one process"):
        train(tiny_run(fsdp=True))


def test_a_launch_that_shards_counts_as_the_option(monkeypatch):
    assert not shards_wanted(False)
    assert shards_wanted(True)
    monkeypatch.setenv(LAUNCH_VARIABLE, "true")
    assert shards_wanted(False)
    assert os.environ[LAUNCH_VARIABLE] == "false"
    monkeypatch.setenv(LAUNCH_VARIABLE, "true")
    monkeypatch.setenv(OFFLOAD_VARIABLE, "true")
    with pytest.raises(ValueError, match="FSDP_OFFLOAD_PARAMS is true"):
        shards_wanted(False)
