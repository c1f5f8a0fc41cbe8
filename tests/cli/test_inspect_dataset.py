"""`hf-maskformer inspect-dataset`: text, JSON, the sheet of overlays and the exit codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from data.hub_sets import cell, parquet_folder, photo, semantic_map, semantic_set
from hf_maskformer.cli.inspect_dataset import draw_picture, draw_sheet, enlarge, stripe
from hf_maskformer.cli.main import main
from hf_maskformer.data.inspection import inspect_dataset


@pytest.fixture
def folder(semantic_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(semantic_folder, tmp_path / "streets"))


def test_text_json_and_overlays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["inspect-dataset", str(folder), "--output-dir", str(output)]) == 0
    text = capsys.readouterr().out
    assert "format semantic_maps" in text
    assert "train: 4 images, sizes (width x height) 64x48 (4)" in text
    assert "problems: none" in text
    numbers = json.loads((output / "streets.json").read_text())
    assert [(split["split"], split["images"]) for split in numbers["splits"]] == [("train", 4), ("val", 2)]
    assert numbers["splits"][0]["classes"][1] == {
        "label_id": 1,
        "name": "right",
        "isthing": False,
        "images": 4,
        "segments": 4,
        "pixels": 4 * 32 * 48,
        "share": 0.5,
        "crowds": 0,
        "crowd_pixels": 0,
    }
    assert numbers["problem_counts"] == {"errors": 0, "warnings": 0, "by_kind": {}}
    with Image.open(output / "streets.png") as sheet:
        assert sheet.width > 2000


def test_files_can_be_named_and_splits_chosen(folder: Path, tmp_path: Path) -> None:
    numbers, overlays = tmp_path / "a" / "n.json", tmp_path / "b" / "o.png"
    words = ["inspect-dataset", folder, "--split", "val", "--format", "semantic_maps", "--task", "semantic"]
    words += ["--json", numbers, "--overlays", overlays, "--output-dir", tmp_path / "unused"]
    assert main([*map(str, words)]) == 0
    assert [split["split"] for split in json.loads(numbers.read_text())["splits"]] == ["val"]
    assert overlays.is_file()
    assert not (tmp_path / "unused").exists()


def test_problems_are_printed_and_strict_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "images" / "train0.png").write_bytes(b"")
    shutil.copy(folder / "train" / "images" / "train1.png", folder / "val" / "images" / "val0.png")
    words = ["inspect-dataset", str(folder), "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "problems: 2 (1 that training would stop at, 1 warnings)" in text
    assert "  error   train/images/train0.png: cannot be read as an image" in text
    assert "  warning val/images/val0.png is the same image as train/images/train1.png" in text
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--strict"])
    assert stopped.value.code == 1
    (folder / "train" / "images" / "train0.png").unlink()
    (folder / "train" / "labels" / "train0.png").unlink()
    assert main([*words, "--strict"]) == 0  # the warning is left


def test_a_set_of_which_nothing_can_be_read_gives_no_picture(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*/images/*"):
        file.write_bytes(b"")
    assert main(["inspect-dataset", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["streets.json"]


def test_what_is_no_dataset_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-dataset", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["inspect-dataset", str(tmp_path), "--dataset-options", "color=1"]) == 2
    assert "does not have the shape of a known format" in capsys.readouterr().err


def test_void_is_striped_and_small_pictures_are_enlarged(folder: Path) -> None:
    label = folder / "val" / "labels" / "val0.png"
    values = np.array(Image.open(label))
    values[:, :32] = 255
    Image.fromarray(values).save(label)
    pictures = inspect_dataset(folder, split="val").pictures
    (picture,) = [picture for picture in pictures if picture.file.name == "val0.png"]
    drawn = np.asarray(draw_picture(picture))
    assert drawn.shape == (480, 640, 3)
    image, void = np.full((40, 40, 3), 200, dtype=np.uint8), np.zeros((40, 40), dtype=bool)
    void[:, :20] = True
    striped = stripe(image, void)
    assert {50, 200} == set(np.unique(striped[:, :20]).tolist())
    assert (striped[:, 20:] == 200).all()
    large, ids = enlarge(image, void.astype(np.int32))
    assert (large.shape, ids.shape) == ((480, 480, 3), (480, 480))


def test_narrow_pictures_are_enlarged_less() -> None:
    for height, width, factor in ((2, 3000, 1), (1000, 2, 2), (48, 64, 10), (100, 600, 4)):
        image, ids = enlarge(np.zeros((height, width, 3), dtype=np.uint8), np.zeros((height, width), dtype=np.int32))
        assert image.shape == (factor * height, factor * width, 3)
        assert ids.shape == image.shape[:2]


def test_outputs_are_checked_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["inspect-dataset", str(folder), "--output-dir", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert "--output-dir" in captured.err
    assert "is no folder" in captured.err
    assert captured.out == ""


def test_deep_and_float_images_are_drawn(folder: Path) -> None:
    file = folder / "val" / "images" / "val0.png"
    Image.fromarray(np.linspace(300, 4000, 48 * 64).reshape(48, 64).astype(np.uint16)).save(file)
    pictures = inspect_dataset(folder, split="val").pictures
    assert len(pictures) == 2
    assert draw_sheet(pictures).width > 2000


def test_deep_images_need_a_range(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = np.linspace(300, 4000, 48 * 64).reshape(48, 64).astype(np.uint16)
    (folder / "val" / "images" / "val0.png").unlink()
    Image.fromarray(deep).save(folder / "val" / "images" / "val0.tif")
    words = ["inspect-dataset", str(folder), "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    line = "  more than 8 bits: 1 of mode I;16"
    assert f"{line}; training needs --intensity-range LOW HIGH\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--strict"])
    assert stopped.value.code == 1
    capsys.readouterr()
    assert main([*words, "--strict", "--intensity-range", "0", "4095"]) == 0
    assert f"{line}\n" in capsys.readouterr().out


def test_the_built_in_scenes_are_nothing_to_inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect-dataset", "scenes"]) == 2
    assert "the built-in scenes are drawn when they are asked for, so there is nothing to" in capsys.readouterr().err


def hub_words(folder: Path, tmp_path: Path, *words: str) -> list[str]:
    options = ["--dataset-options", "id2label={0: road, 1: car}", f"cache_dir={tmp_path / 'cache'}"]
    return ["inspect-dataset", str(folder), "--output-dir", str(tmp_path / "out"), *words, *options]


def test_what_the_library_datasets_reads_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": photo(number), "label": cell(semantic_map(number))} for number in range(4)]
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:50]  # the header is whole
    rows[3]["label"]["bytes"] = b"none"
    train = Dataset.from_list(rows, features=semantic_set().features)
    folder = parquet_folder(tmp_path / "set", train=train, validation=train.select([0]))
    assert main(hub_words(folder, tmp_path)) == 0
    text = capsys.readouterr().out
    assert "format hub" in text
    assert "problems: 3 (2 that training would stop at, 1 warnings)" in text
    numbers = json.loads((tmp_path / "out" / "set.json").read_text())
    assert [(split["split"], split["images"]) for split in numbers["splits"]] == [("train", 3), ("validation", 1)]
    assert [entry["name"] for entry in numbers["splits"][0]["classes"]] == ["road", "car"]
    found = sorted(problem["message"] for problem in numbers["problems"])
    assert f"{folder} train row 3 (label): cannot be read as an image" in found[1]
    assert f"{folder} train image 2: cannot be read as an image" in found[0]
    assert f"{folder} validation image 0 is the same image as {folder} train image 0" in found[2]
    assert Image.open(tmp_path / "out" / "set.png").width > 2000


def test_saved_sets_are_inspected_by_split_and_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    semantic_set(2).save_to_disk(str(tmp_path / "saved"))
    assert main(hub_words(tmp_path / "saved", tmp_path, "--split", "train", "--task", "semantic")) == 0
    assert "train: 2 images, sizes (width x height) 8x6 (2)" in capsys.readouterr().out
    assert main(hub_words(tmp_path / "saved", tmp_path, "--split", "val")) == 2
    assert "has no split 'val'; splits that exist: train" in capsys.readouterr().err
    assert main(hub_words(tmp_path / "saved", tmp_path, "--task", "panoptic")) == 2
    assert "task 'panoptic' is not possible with the columns of" in capsys.readouterr().err
    assert main([*hub_words(tmp_path / "saved", tmp_path), "columns={image: photo}"]) == 2
    assert "there is no column 'photo' (given as image)" in capsys.readouterr().err
