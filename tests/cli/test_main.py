"""The command line from end to end on a tiny model: files, JSON, tables, one-line errors and exit codes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.cli.main import main
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor


def failure(capsys, *words):
    """The error line of a call that must fail with exit code 2."""
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_flags_win_over_the_recipe(trained):
    stored = json.loads((trained / "train_config.json").read_text())
    assert (stored["max_steps"], stored["batch_size"]) == (2, 2)
    assert json.loads((trained / "metrics.json").read_text())["steps"] == 2


def test_evaluate_prints_a_table_and_writes_one_flat_object(trained, semantic_folder, tmp_path, capsys):
    target = tmp_path / "out" / "metrics.json"
    words = ["evaluate", trained / "best", "--dataset", semantic_folder, "--json", target]
    assert main([*map(str, words)]) == 0
    table = capsys.readouterr().out
    assert "left" in table
    assert "mean_iou" in table
    metrics = json.loads(target.read_text())
    assert set(metrics) == {
        "mean_iou",
        "overall_accuracy",
        "mean_accuracy",
        "per_category_iou",
        "per_category_accuracy",
    }
    assert len(metrics["per_category_iou"]) == 2


def test_predict_writes_three_files_an_image(trained, semantic_folder, tmp_path, capsys):
    folder = semantic_folder / "val" / "images"
    words = ["predict", trained / "final", folder, semantic_folder / "train" / "images" / "train0.png"]
    assert main([*map(str, words), "--output-dir", str(tmp_path / "out")]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    endings = ("_overlay.png", "_labels.png", "_segments.json")
    assert names == {f"{stem}{ending}" for stem in ("val0", "val1", "train0") for ending in endings}
    labels = np.asarray(Image.open(tmp_path / "out" / "val0_labels.png"))
    assert labels.shape == (48, 64)
    assert set(np.unique(labels)) <= {0, 1, 255}


def test_sixteen_bit_images_need_a_range(trained, tmp_path, capsys):
    path = tmp_path / "deep.png"
    Image.fromarray(np.linspace(0, 4000, 48 * 64).reshape(48, 64).astype(np.uint16)).save(path)
    words = ["predict", trained / "best", path, "--output-dir", tmp_path / "out"]
    error = failure(capsys, *words)
    assert "deep.png" in error
    assert "intensity" in error
    assert main([*map(str, words), "--intensity-range", "0", "4000"]) == 0
    assert "LOW must be smaller" in failure(capsys, *words, "--intensity-range", "5", "5")


def test_predict_skips_bad_images_when_asked(trained, semantic_folder, tmp_path, capsys):
    good = semantic_folder / "val" / "images" / "val0.png"
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    words = ["predict", trained / "best", bad, good, "--output-dir", tmp_path / "out"]
    assert "bad.png" in failure(capsys, *words)
    assert main([*map(str, words), "--on-bad-sample", "skip"]) == 0
    assert "1 of 2 images" in capsys.readouterr().out


def test_evaluate_reads_deep_images_with_the_range_stored_with_the_model(trained, semantic_folder, tmp_path, capsys):
    root = tmp_path / "deep"
    shutil.copytree(semantic_folder, root)
    for path in (root / "val" / "images").iterdir():
        grey = np.asarray(Image.open(path).convert("L"), dtype=np.uint16)
        path.unlink()
        Image.fromarray(grey * 16).save(path.with_suffix(".png"))
    model = tmp_path / "model"
    shutil.copytree(trained / "best", model)
    words = ["evaluate", model, "--dataset", root, "--json", tmp_path / "metrics.json"]
    assert "--intensity-range" in failure(capsys, *words)
    processor = HfMaskFormerImageProcessor.from_pretrained(model)
    processor.intensity_range = (0, 4095)
    processor.save_pretrained(model)
    assert main([*map(str, words)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["mean_iou"] >= 0


def test_evaluate_skips_bad_images_when_asked(trained, semantic_folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(semantic_folder, root)

    def spoil(name):
        """A JPEG with its header only: it can be indexed."""
        path = root / "val" / "images" / f"{name}.png"
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
        data = path.with_suffix(".jpg").read_bytes()
        path.with_suffix(".jpg").write_bytes(data[: len(data) // 2])

    spoil("val0")
    words = ["evaluate", trained / "best", "--dataset", root, "--json", tmp_path / "metrics.json"]
    words += ["--dataset-options", f"cache_dir={tmp_path / 'cache'}"]
    assert "val0.jpg" in failure(capsys, *words)
    assert main([*map(str, words), "--on-bad-sample", "skip"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped"] == 1
    spoil("val1")
    assert "none of the 2 images can be read" in failure(capsys, *words, "--on-bad-sample", "skip")


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_help_says_what_a_dataset_may_be(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "dataset folder, Hub id, or 'scenes'" in text


def test_presets_are_listed_and_shown(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert "maskformer-light" in listed
    assert "2107.06278" in listed
    assert main(["presets", "maskformer-light"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "hf_maskformer"


def test_a_users_mistakes_are_one_line(trained, semantic_folder, recipe, tmp_path, capsys):
    train = ["train", "--recipe", recipe, "--output-dir", tmp_path / "run"]
    assert "no training budget" in failure(capsys, "train", "--dataset", semantic_folder)
    assert "Unknown preset 'nothing'" in failure(capsys, *train, "--dataset", semantic_folder, "--preset", "nothing")
    assert "nowhere" in failure(capsys, *train, "--dataset", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in failure(capsys, *train, "--dataset", tmp_path / "empty")
    assert "nowhere" in failure(capsys, "evaluate", tmp_path / "nowhere", "--dataset", semantic_folder)
    assert "holds no image" in failure(
        capsys, "predict", trained / "best", tmp_path / "empty", "--output-dir", tmp_path
    )
    assert "does not exist" in failure(
        capsys, "predict", trained / "best", tmp_path / "no.jpg", "--output-dir", tmp_path
    )


def test_a_bad_image_found_by_a_reader_process_is_still_one_line(recipe, semantic_folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(semantic_folder, root)
    path = root / "train" / "images" / "train1.png"
    path.write_bytes(path.read_bytes()[:300])
    words = ["train", "--recipe", recipe, "--dataset", root, "--output-dir", tmp_path / "run", "--num-workers", "1"]
    error = failure(capsys, *words, "--dataset-options", f"cache_dir={tmp_path / 'cache'}")
    assert "train1.png" in error
    assert "Traceback" not in error


def test_debug_shows_the_whole_traceback(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["train", "--dataset", str(tmp_path / "nowhere"), "--max-steps", "1", "--debug"])


def test_an_unknown_flag_is_refused_by_argparse():
    with pytest.raises(SystemExit) as caught:
        main(["train", "--no-such-flag", "1"])
    assert caught.value.code == 2


def test_an_unknown_option_is_named_with_the_nearest(capsys):
    for words, message in (
        (
            ["train", "--lerning-rate", "1e-3"],
            "unknown option --lerning-rate; the nearest one of train is --learning-rate",
        ),
        (
            ["evaluate", "model", "--dataset", "here", "--jsn=out"],
            "unknown option --jsn=out; the nearest one of evaluate is --json",
        ),
        (["presets", "maskformer-r50", "again"], "unexpected argument 'again' after presets"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
