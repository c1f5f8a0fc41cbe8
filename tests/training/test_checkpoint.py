"""Checkpoints are whole or absent, the newest N stay, and the optimizer comes back bit for bit without pickle."""

import errno
import json
import logging
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hf_maskformer.training import checkpoint as checkpoint_module
from hf_maskformer.training.checkpoint import (
    checkpoints,
    load_optimizer,
    load_state,
    newest_checkpoint,
    restore_replaced,
    save_checkpoint,
    save_model,
    write_directory,
)
from hf_maskformer.training.optimizer import build_optimizer


class Saveable(nn.Module):
    """As much of a transformers model as a checkpoint needs."""

    def __init__(self, fail=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.fail = fail

    def save_pretrained(self, directory):
        directory.mkdir(exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors")
        if self.fail:
            raise OSError("disk full")


class Processor:
    def save_pretrained(self, directory):
        (directory / "preprocessor_config.json").write_text("{}")


def optimizer_of(model):
    return build_optimizer(model, learning_rate=0.1, backbone_multiplier=1.0, weight_decay=0.1)


def step(model, optimizer):
    model.layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, model, optimizer, number, keep=2):
    state = {"step": number, "progress": {"step": number, "seconds": 1.5}}
    optimizer_state = optimizer.state_dict()
    return save_checkpoint(
        folder, model=model, processor=Processor(), optimizer_state=optimizer_state, state=state, keep=keep
    )


def test_keeps_the_newest(tmp_path):
    model = Saveable()
    optimizer = optimizer_of(model)
    for number in (1, 2, 10, 9):
        save(tmp_path, model, optimizer, number)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert newest_checkpoint(tmp_path).name == "step-00000010"
    assert load_state(newest_checkpoint(tmp_path))["progress"] == {"step": 10, "seconds": 1.5}


def test_optimizer_state_comes_back_exactly(tmp_path):
    model = Saveable()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    path = save(tmp_path, model, optimizer, 1)
    other = Saveable()
    other.load_state_dict(model.state_dict())
    restored = optimizer_of(other)
    load_optimizer(path, restored)
    step(model, optimizer)
    step(other, restored)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    fresh = Saveable()
    step(fresh, optimizer_of(fresh))
    assert not torch.equal(fresh.layer.weight, other.layer.weight)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    model = Saveable()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    path = save(tmp_path, model, optimizer, 1)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_other_parameters_are_refused(tmp_path):
    model = Saveable()
    path = save(tmp_path, model, optimizer_of(model), 1)
    other = nn.Module()
    other.renamed = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"other parameters.*renamed"):
        load_optimizer(path, optimizer_of(other))


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path):
    model = Saveable()
    optimizer = optimizer_of(model)
    save(tmp_path, model, optimizer, 1, keep=1)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, Saveable(fail=True), optimizer, 2, keep=1)
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, model, optimizer, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
def test_a_disk_that_is_full_in_the_middle_of_a_save_keeps_the_last_checkpoint(tmp_path, monkeypatch, file):
    """The error of a full disk comes from Python for text, from safetensors for tensors."""
    model = Saveable()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    save(tmp_path, model, optimizer, 1, keep=1)

    original = checkpoint_module.save_file

    def full(tensors, path):
        if path.name == file:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path)

    def no_text(path, text):
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        with path.open("w") as opened:
            opened.write(text)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    monkeypatch.setitem(globals(), "save_file", full)
    monkeypatch.setattr(checkpoint_module.Path, "write_text", no_text)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 7, 3 * 2**20))
    with pytest.raises(OSError, match=r"step-00000002 could not be written, 3 MiB are free there: .*No space left"):
        save_checkpoint(
            tmp_path,
            model=model,
            processor=Processor(),
            optimizer_state=optimizer.state_dict(),
            state={"step": 2},
            keep=1,
            average={"layer.bias": torch.zeros(2)},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.parametrize("file", ["model/model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("part", [0, 5, 0.5, -1])
def test_a_checkpoint_cut_off_is_passed_over_and_named(tmp_path, caplog, file, part):
    """Down to nothing, to 5 bytes, to a half, by its last byte."""
    model = Saveable()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    for number in (1, 2):
        save(tmp_path, model, optimizer, number)
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part) if part == 0.5 else part])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path).name == "step-00000001"
    assert f"step-00000002 is not whole and passed over: {path.name}" in caplog.text
    assert [one.name for one in checkpoints(tmp_path)] == ["step-00000001"]
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "step-00000002"


def test_a_checkpoint_without_weights_is_not_whole(tmp_path, caplog):
    model = Saveable()
    save(tmp_path, model, optimizer_of(model), 1)
    (tmp_path / "step-00000001" / "model" / "model.safetensors").unlink()
    assert newest_checkpoint(tmp_path) is None
    assert "holds no weights" in caplog.text


def test_an_incomplete_directory_is_not_a_checkpoint(tmp_path):
    model = Saveable()
    save(tmp_path, model, optimizer_of(model), 1)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "state.json").write_text(json.dumps({"step": 5}))
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_replacing_a_model_directory_keeps_the_old_one_until_the_new_is_whole(tmp_path):
    target = tmp_path / "best"
    save_model(target, Saveable(), Processor())
    (target / "mark").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        save_model(target, Saveable(fail=True), Processor())
    assert (target / "mark").read_text() == "old"
    save_model(target, Saveable(), Processor())
    assert not (target / "mark").exists()


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    target = tmp_path / "best"
    write_directory(target, lambda directory: (directory / "mark").write_text("old"))
    target.rename(tmp_path / ".best.replaced")
    restore_replaced(target)
    assert (target / "mark").read_text() == "old"
