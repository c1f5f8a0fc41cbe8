"""Which files a call of predict means, and how their results are named."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hf_maskformer.cli.main import main
from hf_maskformer.cli.predict import image_files
from hf_maskformer.inference import SegmentationResult


def test_folders_are_listed_once_and_sorted(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    found = image_files([str(tmp_path / "b.JPG"), str(tmp_path)])
    assert [path.name for path in found] == ["b.JPG", "a.png"]


@pytest.mark.parametrize(
    ("files", "stems"),
    [
        (["a.jpg", "a.png", "a-2.png"], ["a", "a-2", "a-2-2"]),
        (["x/a.png", "y/a.png", "b.png"], ["a", "a-2", "b"]),
    ],
)
def test_images_with_the_same_stem_do_not_overwrite_each_other(tmp_path, monkeypatch, capsys, files, stems):
    def result(path):
        return SegmentationResult(
            np.zeros((2, 2), np.int32), [], "panoptic", {0: "sky"}, np.zeros((2, 2, 3), np.uint8), path.stem, str(path)
        )

    predictor = lambda model, **settings: lambda images: [result(path) for path in images]  # noqa: E731
    monkeypatch.setattr("hf_maskformer.inference.predictor.Predictor", predictor)
    paths = [tmp_path / file for file in files]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    out = tmp_path / "out"
    assert main(["predict", "model", *map(str, paths), "--output-dir", str(out)]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    endings = ("_overlay.png", "_panoptic.png", "_segments.json")
    assert {path.name for path in out.iterdir()} == {f"{stem}{ending}" for stem in stems for ending in endings}
    for stem, path in zip(stems, paths, strict=True):
        content = json.loads((out / f"{stem}_segments.json").read_text())
        assert (content["name"], content["file_name"]) == (stem, str(path))


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
