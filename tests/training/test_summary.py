"""What a run cost and reached, as numbers and as the table that ends the command."""

import json
import sys

import pytest
import torch

from hf_maskformer.training import summary as summary_module
from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.summary import peak_rss, run_facts, summary_table
from hf_maskformer.training.train import train

SUMMARY = {
    "pq": 0.25,
    "images": 1200,
    "pq_stuff": float("nan"),
    "per_category": [{"pq": 0.25}],
    "main_metric": "pq",
    "steps": 1500,
    "training_minutes": 12.34,
    "images_per_second": 8.06,
    "data_wait_share": 0.0312,
    "peak_memory_mib": 1536.0,
    "peak_memory_of": "rss",
    "best_step": 1000,
    "best_value": 0.31,
    "seed": 0,
}


def test_facts_of_a_run():
    state = TrainState(step=30, seconds=120.0, data_seconds=6.0)
    facts = run_facts(state, images_per_step=16, device=torch.device("cpu"))
    assert facts["steps"] == 30
    assert facts["training_minutes"] == 2.0
    assert facts["images_per_second"] == 4.0
    assert facts["data_wait_share"] == pytest.approx(0.05)
    assert facts["peak_memory_of"] == "rss"
    assert 50 < facts["peak_memory_mib"] < 100_000


def test_the_peak_is_in_bytes_and_grows_with_what_is_held():
    before = peak_rss()
    held = torch.ones(before + 64 * 2**20, dtype=torch.uint8)
    assert peak_rss() >= before + 32 * 2**20
    del held


def test_nothing_is_divided_by_no_time():
    facts = run_facts(TrainState(), images_per_step=16, device=torch.device("cpu"))
    assert facts["images_per_second"] is None
    assert facts["data_wait_share"] is None


def test_the_table(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "log.jsonl").touch()
    lines = summary_table(SUMMARY, tmp_path).splitlines()
    rule = lines[0]
    assert set(rule) == {"-"}
    assert lines[1:-1] == [
        "steps             1,500",
        "training          12.3 minutes (without evaluations and checkpoints)",
        "speed             8.1 images/s",
        "waiting for data  3.1 % of the training time",
        "peak memory       1.50 GiB of the main process",
        "best pq           0.3100 at step 1,000",
        "final pq          0.2500",
        "final images      1,200",
        "final pq_stuff    -",
        rule,
        f"{tmp_path / 'best'}       the weights that were best on the val split",
        f"{tmp_path / 'log.jsonl'}  every logged step",
    ]


def test_without_truth_to_measure_nothing_is_called_best(tmp_path):
    (tmp_path / "best").mkdir()
    table = summary_table({**SUMMARY, "best_value": -1.0}, tmp_path)
    assert "best pq" not in table
    assert "weights that no score has chosen" in table


def test_a_run_without_validation_has_no_metric_rows(tmp_path):
    summary = {"steps": 3, "training_minutes": 0.1, "best_step": None, "best_value": None, "seed": 1}
    table = summary_table(summary, tmp_path)
    assert "best" not in table
    assert "final" not in table
    assert "steps     3" in table


def test_the_time_spent_waiting_is_in_the_log_and_in_the_metrics(tiny_run, tmp_path):
    metrics = train(tiny_run(num_samples=0))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "event" not in line]
    waited, total = (sum(line[name] for line in steps) for name in ("data_seconds", "seconds_per_step"))
    for line in steps:
        assert line["data_wait_share"] == pytest.approx(line["data_seconds"] / line["seconds_per_step"])
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["data_wait_share"] == metrics["data_wait_share"] == pytest.approx(waited / total)
    assert stored["images_per_second"] == pytest.approx(4 * 2 / total)
    assert stored["main_metric"] == "pq"


def test_a_resumed_run_counts_the_time_before_it_too(tiny_run, tmp_path):
    train(tiny_run(max_steps=2, num_samples=0))
    metrics = train(tiny_run(resume=True, max_steps=4, num_samples=0))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "event" not in line]
    assert len(steps) == 4
    waited, total = (sum(line[name] for line in steps) for name in ("data_seconds", "seconds_per_step"))
    assert metrics["data_wait_share"] == pytest.approx(waited / total)


def test_a_system_that_tells_no_memory_leaves_it_out(monkeypatch):
    monkeypatch.setattr(summary_module.sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    facts = run_facts(TrainState(), images_per_step=1, device=torch.device("cpu"))
    assert facts["peak_memory_mib"] is None
    assert "peak memory" not in summary_table(facts, "nowhere")
