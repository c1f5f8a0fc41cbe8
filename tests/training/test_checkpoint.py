"""Checkpoints are whole or absent, the newest N stay, and the optimizer comes back bit for bit without pickle."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hf_maskformer.training import checkpoint as checkpoint_module
from hf_maskformer.training.checkpoint import (
    checkpoints,
    damage,
    load_optimizer,
    load_state,
    newest_checkpoint,
    restore_replaced,
    save_checkpoint,
    save_model,
    store_progress,
    write_directory,
    write_text,
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


def save_with_average(folder, model, number, keep=1):
    return save_checkpoint(
        folder,
        model=model,
        processor=Processor(),
        optimizer_state=optimizer_of(model).state_dict(),
        state={"step": number, "progress": {"step": number}},
        keep=keep,
        average={"layer.bias": torch.zeros(2)},
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


FILES = ("model/model.safetensors", "model/preprocessor_config.json", "ema.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_lacks_a_file_is_not_whole(tmp_path, file):
    model = Saveable()
    path = save_with_average(tmp_path, model, 1)
    store_progress(tmp_path, 1, {"step": 1, "seconds": 9.0})  # writes the state anew
    assert damage(path) is None
    (path / file).unlink()
    assert Path(file).name in damage(path) or "holds no weights" in damage(path)


def test_another_size_than_the_stored_one_is_damage(tmp_path):
    path = save_with_average(tmp_path, Saveable(), 1)
    (path / "model" / "preprocessor_config.json").write_text("{ }")
    assert damage(path) == "preprocessor_config.json has 3 bytes instead of 2"


def test_a_checkpoint_of_a_version_that_did_not_list_files_is_whole(tmp_path):
    path = save_with_average(tmp_path, Saveable(), 1)
    state = json.loads((path / "state.json").read_text())
    assert set(state.pop("files")) == set(FILES)
    (path / "state.json").write_text(json.dumps(state))
    assert damage(path) is None


# --- what a killed process or a switched off machine leaves ----------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """What was brought to the disk and renamed, in order: ("sync", inode) and ("rename", inode, new name)."""

    def sync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino))

    def rename(path, target):
        events.append(("rename", path.stat().st_ino, target.name))
        os.rename(path, target)

    events = []
    monkeypatch.setattr(checkpoint_module.os, "fsync", sync)
    monkeypatch.setattr(checkpoint_module.Path, "rename", rename)
    monkeypatch.setattr(checkpoint_module.os, "replace", lambda path, target: rename(Path(path), Path(target)))
    return events


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_before_others_go(tmp_path, disk):
    model = Saveable()
    save_with_average(tmp_path, model, 1)
    disk.clear()
    path = save_with_average(tmp_path, model, 2)
    named = disk.index(("rename", path.stat().st_ino, "step-00000002"))
    before = {event[1] for event in disk[:named] if event[0] == "sync"}
    assert before == {part.stat().st_ino for part in (path, *path.rglob("*"))}
    assert disk[named + 1] == ("sync", tmp_path.stat().st_ino)
    assert [event[2] for event in disk[named + 2 :]] == [".step-00000001.removed"]


def test_a_text_is_on_the_disk_before_it_replaces_another(tmp_path, disk):
    path = tmp_path / "state.json"
    write_text(path, "new")
    inode = path.stat().st_ino
    assert disk == [("sync", inode), ("rename", inode, "state.json"), ("sync", tmp_path.stat().st_ino)]


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_disk_that_cannot_be_asked_is_not_a_disk_that_fails(tmp_path, monkeypatch, number, raised):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_module.os, "fsync", fsync)
    if raised:
        with pytest.raises(OSError, match="step-00000001 could not be written"):
            save_with_average(tmp_path, Saveable(), 1)
        assert list(tmp_path.iterdir()) == []
    else:
        assert damage(save_with_average(tmp_path, Saveable(), 1)) is None


def test_a_deletion_that_is_cut_off_leaves_nothing_for_ever(tmp_path, monkeypatch):
    """Killed while step 1 is deleted: it is no checkpoint from the first moment on, the next save clears it away."""

    def killed(path, **keywords):
        if "step-00000001" in Path(path).name:
            (Path(path) / "optimizer.safetensors").unlink()
            raise KeyboardInterrupt
        return rmtree(path, **keywords)

    model, rmtree = Saveable(), shutil.rmtree
    save_with_average(tmp_path, model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_with_average(tmp_path, model, 2)
    assert [path.name for path in checkpoint_module.checkpoint_folders(tmp_path)] == ["step-00000002"]
    save_with_average(tmp_path, model, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_save_clears_away_what_is_older_and_not_whole(tmp_path):
    """Nothing newer than the newest whole one, nothing whole that is to be kept, nothing of other names."""
    model = Saveable()
    for number in (1, 2, 3, 4, 8):
        save_with_average(tmp_path, model, number, keep=9)
    for number in (2, 4, 8):
        (tmp_path / f"step-0000000{number}" / "ema.safetensors").unlink()
    for name in (".step-00000005.unfinished", ".step-00000008.replaced", ".step-00000001.removed", ".mine.removed"):
        (tmp_path / name / "model").mkdir(parents=True)
    save_with_average(tmp_path, model, 5, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".mine.removed", "step-00000003", "step-00000005", "step-00000008"]


def test_where_no_checkpoint_is_whole_none_is_deleted(tmp_path):
    path = save_with_average(tmp_path, Saveable(), 1)
    (path / "ema.safetensors").unlink()
    checkpoint_module.remove_old(tmp_path, keep=1)
    assert path.is_dir()


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
