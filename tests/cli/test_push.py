"""`hf-maskformer push` and `train --push-to-hub` against a stand-in of the Hub: one line and an exit code."""

import shutil

import pytest

from hf_maskformer.cli.main import main
from hub.stand_in import stand_in_of_the_hub


@pytest.fixture
def hub(monkeypatch):
    with stand_in_of_the_hub(monkeypatch) as server:
        yield server


def test_push_sends_the_run(hub, trained, capsys):
    assert main(["push", str(trained), "me/sides", "--license", "cc-by-4.0", "--no-samples"]) == 0
    assert capsys.readouterr().out.startswith(f"published: {hub.endpoint}/me/sides/commit/")
    files = hub.repos["me/sides"]["main"]
    assert b"license: cc-by-4.0\n" in files["README.md"]
    assert not [path for path in files if path.startswith("samples/")]


def test_a_refused_push_is_one_line(hub, trained, tmp_path, capsys):
    assert main(["push", str(tmp_path / "absent"), "me/x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: run {tmp_path / 'absent'} does not exist")
    assert main(["push", str(trained), "other/sides"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the token has no right to write other/sides")


def test_train_pushes_at_its_end_or_says_how_to(hub, trained, tmp_path, capsys):
    """A finished run is resumed, which only measures it again and pushes."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    words = ["train", "--resume", "--output-dir", str(run), "--push-to-hub", "me/sides"]
    hub.broken["commit"] = 403
    assert main(words) == 2
    printed = capsys.readouterr()
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith(f"error: the run is finished and whole in {run}, but it was not published: the token")
    assert error.endswith(f"send it with: hf-maskformer push {run} me/sides")
    assert "steps" in printed.out  # the table of the run is shown all the same
    del hub.broken["commit"]
    assert main(words) == 0
    assert "model.safetensors" in hub.repos["me/sides"]["main"]


def test_a_wrong_repository_is_refused_before_training(hub, recipe, semantic_folder, tmp_path, capsys):
    words = [
        "train",
        "--recipe",
        str(recipe),
        "--dataset",
        str(semantic_folder),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--push-to-hub", "not an id"]) == 2
    assert "repository id 'not an id' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()
