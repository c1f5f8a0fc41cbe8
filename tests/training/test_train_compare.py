"""The comparison takes a finished run that reported otherwise, and refuses one that was trained otherwise."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from hf_maskformer.training.train import train


@pytest.fixture
def compare(project_root):
    path = project_root / "benchmarks" / "train_compare.py"
    spec = importlib.util.spec_from_file_location("train_compare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reporting_may_differ_and_training_may_not(compare, tiny_run):
    config = tiny_run(max_steps=1, val_split=None)
    train(config)
    run = Path(config.output_dir)
    reporting = {"evaluations": 3, "eval_limit": 5, "eval_batch_size": 1, "log_every": 7, "num_samples": 0}
    other = dataclasses.replace(config, output_dir="elsewhere", checkpoint_every=9, keep_checkpoints=1, **reporting)
    row = compare.ours_row(other, run)
    assert row["steps"] == 1
    assert row["parameters"] > 0
    with pytest.raises(ValueError, match=r"was trained with learning_rate = 0\.001, wanted is 0\.002"):
        compare.ours_row(dataclasses.replace(other, learning_rate=2e-3), run)
