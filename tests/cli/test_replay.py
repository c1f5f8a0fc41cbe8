"""`hf-maskformer replay` on a failed step of the command line's own training: lines and exit codes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_maskformer.cli.main import main
from hf_maskformer.training import train as train_module


@pytest.fixture(scope="module")
def failed(semantic_folder, recipe, tmp_path_factory):
    """The diary's folder of a run whose second step has an image with a value that is not finite."""
    run = tmp_path_factory.mktemp("runs") / "failed"
    words = ["train", "--recipe", str(recipe), "--dataset", str(semantic_folder), "--output-dir", str(run)]
    words += ["--max-steps", "2", "--val-split", "none", "--dataset-options", f"cache_dir={run.parent / 'cache'}"]
    original, calls = train_module.move, []

    def move(batch, device):
        moved = original(batch, device)
        calls.append(1)
        if len(calls) == 2:
            moved["pixel_values"][1, 0, 0, 0] = float("inf")
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "move", move)
        assert main(words) == 1
    return run / "failures" / "step-00000001"


def image_ids(folder):
    return json.loads((folder / "process-0" / "failure.json").read_text())["batches"][0]["image_ids"]


def test_a_step_that_fails_again_is_exit_code_1(failed, capsys):
    assert main(["replay", str(failed), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    good, bad = image_ids(failed)
    assert f"{good} alone: finite\n" in printed.out
    assert f"{bad} alone: not finite: pixel_values" in printed.out
    assert "error: step 1 fails again" in printed.err


def test_a_step_that_does_not_is_exit_code_0(failed, tmp_path, capsys):
    folder = tmp_path / "mended"
    shutil.copytree(failed, folder)
    file = folder / "process-0" / "batches.safetensors"
    save_file({name: tensor.nan_to_num(posinf=0) for name, tensor in load_file(file).items()}, file)
    assert main(["replay", str(folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "step 1 does not fail on cpu"
    names = [line.split(":")[0].strip() for line in lines]
    assert {"loss", "loss_class", "loss_mask", "loss_dice", "gradient norm"} <= set(names)


def test_a_weight_that_is_not_finite_is_named(failed, tmp_path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(failed, folder)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.self_attention.value.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["replay", str(folder), "--device", "cpu"]) == 1
    assert f"weights before the step that are not finite: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["process-0/failure.json", "process-0/batches.safetensors", "model"])
def test_a_folder_that_is_not_whole_is_exit_code_2(failed, tmp_path, capsys, missing):
    folder = tmp_path / "cut"
    shutil.copytree(failed, folder)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["replay", str(folder), "--device", "cpu"]) == 2
    assert missing in capsys.readouterr().err
