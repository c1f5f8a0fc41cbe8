"""Which files a call of predict means, and how their results are named."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_maskformer.cli.main import main
from hf_maskformer.cli.predict import image_files, unique_names


def test_folders_are_listed_once_and_sorted(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    found = image_files([str(tmp_path / "b.JPG"), str(tmp_path)])
    assert [path.name for path in found] == ["b.JPG", "a.png"]


def test_images_with_the_same_stem_do_not_overwrite_each_other():
    names = unique_names([Path("x/a.png"), Path("y/a.png"), Path("b.png")])
    assert list(names.values()) == ["a", "a-2", "b"]


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, tmp_path, capsys):
    (tmp_path / "a.png").touch()
    words = ["predict", str(tmp_path / "no model"), str(tmp_path / "a.png"), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--device", device]) == 2
    assert f"--device {device!r} is not there; devices of this machine: cpu" in capsys.readouterr().err
    assert main([*words, "--device", "cpu"]) == 2
    assert "no model is no directory" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "a.png")]) == 2
    assert "a.png is no folder" in capsys.readouterr().err


def test_the_merge_reaches_the_predictor(tmp_path, monkeypatch):
    made = []

    def predictor(model, **settings):
        made.append(settings["merge"])
        return lambda images: [SimpleNamespace(save=lambda folder, stem: None)]

    monkeypatch.setattr("hf_maskformer.inference.predictor.Predictor", predictor)
    (tmp_path / "a.png").touch()
    words = ["predict", "model", str(tmp_path / "a.png"), "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--merge", "mask_wise"]) == 0
    assert made == [None, "mask_wise"]
    with pytest.raises(SystemExit):
        main([*words, "--merge", "topk"])
