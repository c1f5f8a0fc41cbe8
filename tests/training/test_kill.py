"""A run that SIGKILL ends at random moments, and what the script that kills it compares."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_maskformer.training.train import train


@pytest.fixture
def script(project_root, monkeypatch):
    """The module behind scripts/kill_and_resume.py."""
    monkeypatch.syspath_prepend(str(project_root / "benchmarks"))
    import kill_and_resume

    return kill_and_resume


@pytest.mark.slow
def test_three_kills_leave_no_trace(project_root, tmp_path):
    result = tmp_path / "kills.json"
    command = [sys.executable, "scripts/kill_and_resume.py", "--kills", "3", "--json", str(result)]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(result.read_text())
    assert len(report["kills"]) >= 3
    assert {kill["kind"] for kill in report["kills"]} == {"time", "writing"}
    assert report["problems"] == []
    assert report["tensors"] > 500
    assert "3 kills in" in done.stdout


@pytest.fixture
def runs(tiny_run, tmp_path):
    """A run, and a copy of it."""
    train(tiny_run("whole", max_steps=2, ema_decay=0.9))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    return tmp_path / "whole", tmp_path / "cut"


def test_a_bit_of_any_part_is_seen(script, runs):
    whole, cut = runs
    count, found = script.differences(whole, cut)
    assert count > 100
    assert found == []
    checkpoint = "checkpoints/step-00000002"
    for name in ("final/model", f"{checkpoint}/optimizer", f"{checkpoint}/ema", f"{checkpoint}/model/model"):
        path = cut / f"{name}.safetensors"
        tensors = load_file(path)
        key = next(key for key, tensor in tensors.items() if tensor.numel() > 1)
        tensors[key].view(-1).view(torch.uint8)[0] ^= 1
        save_file(tensors, path)
        assert script.differences(whole, cut)[1] == [f"{name}.safetensors: {key}"]
        shutil.copy(whole / f"{name}.safetensors", path)


def test_figures_count_and_times_do_not(script, runs):
    whole, cut = runs
    metrics = json.loads((cut / "metrics.json").read_text())
    (cut / "metrics.json").write_text(json.dumps({**metrics, "training_minutes": 1e3, "peak_memory_mib": 1.0}))
    assert script.differences(whole, cut)[1] == []
    (cut / "metrics.json").write_text(json.dumps({**metrics, "best_step": 7}))
    assert script.differences(whole, cut)[1] == ["metrics.json"]


def test_a_file_too_many_and_a_log_line_too_few_are_seen(script, runs):
    whole, cut = runs
    (cut / "best" / "left").write_text("")
    lines = (cut / "log.jsonl").read_text().splitlines()
    (cut / "log.jsonl").write_text("\n".join(lines[1:]) + "\n")
    found = script.differences(whole, cut)[1]
    assert found[0] == "best/left is in one run only"
    assert found[1].startswith("log.jsonl: ")
    assert len(found) == 2


def test_nan_is_itself_and_zero_is_not_minus_zero(script):
    nan, zero = torch.tensor([float("nan")]), torch.tensor(0.0)
    assert script.same(nan, nan.clone())
    assert not script.same(zero, -zero)
    assert not script.same(zero, zero.double())
