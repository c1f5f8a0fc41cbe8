"""Trackers beside log.jsonl: refused before the first step where they cannot work, and fed with numbers only."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_maskformer.training import trackers
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.train import train


def test_no_tracker_asks_nothing_of_accelerate(tmp_path):
    assert trackers.tracker_options(None, tmp_path) == {}


def test_an_unknown_tracker_is_refused_before_a_run_begins(tmp_path):
    config = TrainConfig(dataset="scenes", max_steps=1, tracker="papyrus", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"tracker is 'papyrus'; Accelerate .* has .*tensorboard.*wandb"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_tracker_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(ValueError, match=r"'tensorboard', but its package is not installed: pip install tensorboard"):
        trackers.tracker_options("tensorboard", tmp_path)


def test_numbers_are_grouped_and_the_rest_stays_out():
    seen = []
    accelerator = SimpleNamespace(trackers=["one"], log=lambda values, step: seen.append((values, step)))
    trackers.log_to_tracker(accelerator, {"loss": 1.5, "term": float("nan"), "note": "text"}, step=3)
    trackers.log_to_tracker(accelerator, {"event": "evaluation", "pq": 0.25}, step=4)
    trackers.log_to_tracker(accelerator, {"event": "evaluation", "pq": None}, step=5)
    assert seen == [({"train/loss": 1.5}, 3), ({"evaluation/pq": 0.25}, 4)]


def test_a_log_holds_json_only(tmp_path):
    log = trackers.JsonlLog(tmp_path / "log.jsonl")
    log.write(step=1, grad_norm=float("inf"), loss=float("nan"), lr=0.5)
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "loss": None, "lr": 0.5}


def test_a_full_disk_leaves_the_log_of_a_resumed_run(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log = trackers.JsonlLog(path)
    for step in (1, 2, 3):
        log.write(step=step)
    before = path.read_text()

    def full(self, text, *args, **keywords):
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"log\.jsonl could not be written"):
            trackers.JsonlLog(path, resume_step=2)
    assert path.read_text() == before
    trackers.JsonlLog(path, resume_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_tensorboard_gets_the_losses(tmp_path: Path):
    run = tmp_path / "run"
    options = {"length": 4, "image_size": 64}
    train(
        TrainConfig(
            dataset="scenes",
            task="semantic",
            output_dir=str(run),
            max_steps=2,
            batch_size=2,
            num_workers=0,
            log_every=1,
            num_samples=1,
            evaluations=1,
            dataset_options=options,
            val_dataset_options=options,
            config_overrides={"image_size": [64, 64]},
        )
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {file.parent for file in run.rglob("events.out.tfevents*")}  # the options have a file of their own
    opened = [EventAccumulator(str(folder)).Reload() for folder in folders]
    (events,) = [events for events in opened if "train/loss" in events.Tags()["scalars"]]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    (picture,) = events.Images("evaluation/samples")
    assert picture.step == 2
    assert min(picture.width, picture.height) >= 64
