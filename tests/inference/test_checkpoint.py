"""Directories that cannot or must not be loaded, each with its reason."""

import json
import re
import shutil

import pytest
import torch
from transformers import MaskFormerImageProcessor as OfficialProcessor

from hf_maskformer.export.export import FILE_NAMES, RECORD_NAME
from hf_maskformer.inference import Predictor
from hf_maskformer.inference.checkpoint import load_checkpoint
from official_peer import tiny_maskformer


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_loads_in_eval_mode(checkpoint):
    model, processor = load_checkpoint(str(checkpoint))
    assert not model.training
    assert processor.task == model.config.task == "panoptic"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "semantic"}, "task is 'panoptic' in the model's config but 'semantic' in the image processor"),
        ({"thing_label_ids": [1]}, r"thing_label_ids is \[2\] .* but \[1\]"),
        ({"id2label": {"0": "sky", "1": "crate", "2": "grass"}}, "id2label is .*'grass'.* but .*'crate'"),
    ],
)
def test_config_and_processor_must_agree(copied, fields, message):
    change(copied / "preprocessor_config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        Predictor(copied)
    assert str(copied) in str(error.value)


def test_processor_without_a_task_agrees(copied):
    change(copied / "preprocessor_config.json", task=None, id2label=None, thing_label_ids=None)
    assert Predictor(copied, device="cpu").task == "panoptic"


def test_another_model_type_is_named(copied):
    change(copied / "config.json", model_type="detr")
    with pytest.raises(ValueError, match=r"'detr'.*'hf_maskformer'.*'maskformer'") as error:
        Predictor(copied)
    assert str(copied) in str(error.value)


def test_pickled_weights_are_never_opened(copied):
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*pytorch_model\.bin") as error:
        Predictor(copied)
    assert str(copied) in str(error.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"no weights.*model\.safetensors"),
        ("config.json", r"no config\.json"),
        ("preprocessor_config.json", r"no preprocessor_config\.json"),
    ],
)
def test_missing_files_are_named(copied, missing, message):
    (copied / missing).unlink()
    with pytest.raises(ValueError, match=message) as error:
        Predictor(copied)
    assert str(copied) in str(error.value)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json") as error:
        Predictor(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_files_are_named(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no directory that can be loaded") as error:
        Predictor(copied)
    assert str(copied) in str(error.value)


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="no directory and cannot be a Hub id"):
        Predictor(tmp_path / "absent")
    with pytest.raises(ValueError, match="no-such-owner/no-such-model is no directory or Hub id that can be loaded"):
        Predictor("no-such-owner/no-such-model")


def test_a_torch_export_program_says_what_loads_it(tmp_path):
    path = tmp_path / FILE_NAMES["torch-export"]
    path.write_bytes(b"PK")
    message = (
        f"{path} is a torch-export program, which torch.export.load loads; Predictor runs checkpoints (a directory or "
        "Hub id) and .onnx files, which `hf-maskformer export --format onnx` writes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Predictor(path)


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(checkpoint):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; pass the directory of a checkpoint"):
        Predictor(checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.onnx", "model.int8.onnx"], "pass a file in it: {folder}/model.int8.onnx or {folder}/model.onnx"),
        (["model.onnx", "model.pt2"], "pass a file in it: {folder}/model.onnx"),
        (
            ["model.pt2"],
            "torch.export.load loads {folder}/model.pt2; for Predictor pass the checkpoint that it was made of, or an "
            ".onnx file (`hf-maskformer export --format onnx`)",
        ),
    ],
)
def test_a_folder_of_exported_files_says_which_to_pass(tmp_path, files, message):
    for name in (*files, RECORD_NAME, "preprocessor_config.json"):
        (tmp_path / name).touch()
    expected = f"{tmp_path} holds an exported model and no checkpoint (config.json); {message.format(folder=tmp_path)}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Predictor(str(tmp_path))


def test_an_official_checkpoint_stores_no_task_and_no_things(tmp_path):
    torch.manual_seed(0)
    tiny_maskformer().save_pretrained(tmp_path)
    OfficialProcessor(size={"shortest_edge": 40, "longest_edge": 64}).save_pretrained(tmp_path)
    model, processor = load_checkpoint(tmp_path)
    assert not model.training
    assert (processor.task, processor.id2label, processor.thing_label_ids) == (None, None, None)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    for task in ("semantic", "instance", "panoptic"):
        assert Predictor(tmp_path, task=task, device="cpu").task == task
    assert Predictor(tmp_path, device="cpu").task == "panoptic"
