"""Training on streamed data: the samples of every reader, the budgets it allows, and a run that is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.hub_sets import parquet_folder, semantic_set
from hf_maskformer.data.hub import load_hub
from hf_maskformer.data.stream import TrainingStream
from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.config import TrainConfig, check_same_run
from hf_maskformer.training.data_stream import EndlessSamples, streamed_batches
from hf_maskformer.training.train import train

COUNT = 7
OPTIONS = {"id2label": {0: "road", 1: "car"}, "streaming": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven training images in two files, one of validation."""
    return parquet_folder(tmp_path / "set", shards=2, train=semantic_set(COUNT), validation=semantic_set(1))


def batches(folder: Path, count: int, *, first_batch: int = 0, num_workers: int = 0, **arguments: Any) -> list[Any]:
    stream = TrainingStream(load_hub(folder, "train", None, OPTIONS), seed=5, **arguments)
    found = streamed_batches(stream, image_ids, batch_size=2, first_batch=first_batch, num_workers=num_workers)
    return [next(found) for _ in range(count)]


def image_ids(samples: list[Any]) -> list[int]:
    return [int(sample.image[0, 0, 0]) for sample in samples]


def test_epochs_follow_each_other_without_a_gap(folder):
    found = [number for batch in batches(folder, COUNT) for number in batch]
    assert sorted(found[:COUNT]) == sorted(found[COUNT:]) == list(range(COUNT))
    assert found[:COUNT] != found[COUNT:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_where_the_first_one_was(folder, num_workers):
    whole = batches(folder, 9, num_workers=num_workers)
    for first in (1, 4, 6):  # 4: beyond the first epoch
        assert batches(folder, 9 - first, first_batch=first, num_workers=num_workers) == whole[first:]


def test_there_are_no_more_readers_than_files(folder, caplog):
    found = batches(folder, COUNT, num_workers=3)
    assert "2 reader processes instead of 3" in caplog.text
    assert {number for batch in found for number in batch} == set(range(COUNT))


def test_a_stream_without_samples_ends():
    class Nothing(TrainingStream):
        def __init__(self) -> None:
            self.data = "no data"

        def numbered_samples(self, epoch: int, first: int = 0) -> Any:
            return iter(())

    with pytest.raises(ValueError, match="no sample was found in 100 passes"):
        next(iter(EndlessSamples(Nothing(), batch_size=2, first_batch=0)))


def test_a_budget_in_epochs_needs_a_length():
    with pytest.raises(ValueError, match=r"epochs is 2, but the length of streamed data is not known: give max_steps"):
        Budget(TrainConfig(epochs=2), num_images=None, images_per_step=8)
    budget = Budget(TrainConfig(max_steps=2), num_images=None, images_per_step=8)
    assert [budget.progress(TrainState(step=step)) for step in (0, 1, 2)] == [0, 0.5, 1]


@pytest.fixture
def streamed_run(tiny_run, folder, tmp_path):
    def make(name: str, **changes: Any) -> TrainConfig:
        fields = {
            "dataset": str(folder),
            "format": "hub",
            "dataset_options": OPTIONS,
            "val_dataset_options": {"id2label": OPTIONS["id2label"], "cache_dir": str(tmp_path / "cache")},
        }
        return tiny_run(name, **{**fields, **changes})

    return make


def test_a_run_on_streamed_data_is_resumed_exactly(streamed_run):
    whole, cut = streamed_run("whole", max_steps=4), streamed_run("cut", max_steps=4)
    assert 0 <= train(whole)["mean_iou"] <= 1
    cut.max_steps = 2
    cut.schedule = whole.schedule = "constant"
    whole.output_dir += "2"
    train(whole)
    train(cut)
    cut.max_steps, cut.resume = 4, True
    train(cut)
    expected, found = (load_file(f"{c.output_dir}/final/model.safetensors") for c in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_streamed_data_cannot_do_is_refused_before_the_first_step(streamed_run):
    with pytest.raises(ValueError, match="the length of streamed data is not known"):
        train(streamed_run("epochs", epochs=1.0, max_steps=None))
    with pytest.raises(ValueError, match="val is streamed, but images to evaluate on are taken by their number"):
        train(streamed_run("val", val_dataset_options=OPTIONS))


def test_a_resumed_stream_needs_the_same_number_of_readers(streamed_run):
    stored = json.loads(json.dumps(streamed_run("run", num_workers=2).to_dict()))
    with pytest.raises(ValueError, match="num_workers: 2 then, 1 now"):
        check_same_run(stored, streamed_run("run", num_workers=1))
    numbered = json.loads(json.dumps(TrainConfig(max_steps=1, num_workers=2).to_dict()))
    check_same_run(numbered, TrainConfig(max_steps=1, num_workers=1))
