"""Formats are found by the folder's shape; everything else is an error that says what was found."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_maskformer.data import load as load_function
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.load import find_layouts, list_splits, load, open_source
from hf_maskformer.data.problems import Problems

load_module = sys.modules[load_function.__module__]


def test_missing_split_names_those_that_exist(semantic_folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'; splits that exist: train, val"):
        load(semantic_folder, split="test")
    assert list_splits(semantic_folder) == ["train", "val"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; allowed: a folder of one of the shapes, or 'scenes'"):
        load(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'train' and no other: it holds nothing. Allowed shapes:\n"):
        load(tmp_path)


def test_unknown_shape_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "masks").mkdir()
    with pytest.raises(ValueError, match=r"train does not have the shape of a known format: it holds images/, masks/"):
        load(tmp_path)


def test_a_folder_that_is_one_split(semantic_folder: Path, cache_dir: str) -> None:
    names = (semantic_folder / "id2label.json").read_text()
    (semantic_folder / "train" / "id2label.json").write_text(names)
    data = load(semantic_folder / "train", split=None, cache_dir=cache_dir)
    assert (data.format, data.split, len(data)) == ("semantic_maps", None, 2)
    with pytest.raises(ValueError, match=r"its images/ lies at the top, so pass split=None"):
        load(semantic_folder / "train")
    with pytest.raises(ValueError, match=r"has several splits, choose one with split=: train, val"):
        load(semantic_folder, split=None)


def test_task_decides_between_two_formats(instance_folder: Path, panoptic_folder: Path, cache_dir: str) -> None:
    for part in ("panoptic.json", "panoptic"):
        (panoptic_folder / "train" / part).rename(instance_folder / "train" / part)
    with pytest.raises(ValueError, match=r"a\.png, which is not in"):  # the panoptic file is taken, and does not fit
        load(instance_folder, cache_dir=cache_dir)
    assert load(instance_folder, task="instance", cache_dir=cache_dir).format == "coco_instance"
    assert load(instance_folder, format="coco_instance", cache_dir=cache_dir).task == "instance"


def test_format_that_does_not_fit(semantic_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"shape of format coco_panoptic: it holds images/, labels/"):
        load(semantic_folder, format="coco_panoptic")
    with pytest.raises(ValueError, match=r"format 'voc' is not known, allowed: semantic_maps, coco_instance"):
        load(semantic_folder, format="voc")


def test_task_that_the_format_cannot_serve(semantic_folder: Path, instance_folder: Path) -> None:
    message = "task 'instance' is not possible with format semantic_maps, allowed: semantic; objects are read from"
    with pytest.raises(ValueError, match=message):
        load(semantic_folder, task="instance")
    with pytest.raises(ValueError, match="task 'panoptic' is not possible with format coco_instance"):
        load(instance_folder, task="panoptic")
    with pytest.raises(ValueError, match="task 'depth' is not possible"):
        load(semantic_folder, task="depth")


def test_unknown_option_lists_the_allowed(semantic_folder: Path) -> None:
    with pytest.raises(ValueError, match="option 'lenght' is not known for format scenes, allowed: length, seed"):
        load("scenes", lenght=3)
    with pytest.raises(ValueError, match="option 'seed' is not known for format semantic_maps"):
        load(semantic_folder, seed=3)


def test_volumes_are_not_trained_on(shared_data: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"hippocampus/train holds volumes .*: they can be inspected \(hf-maskformer inspect-dataset\)",
    ):
        load(shared_data / "hippocampus")


@pytest.mark.parametrize("name", ["camvid", "nuclei"])
def test_real_data_keeps_its_format(name: str, shared_data: Path) -> None:
    formats = {"camvid": ["semantic_maps"], "nuclei": ["coco_panoptic", "coco_instance"]}
    for split in ("train", "val"):
        assert [layout.format for layout in find_layouts(shared_data / name, split)] == formats[name]
    assert list_splits(shared_data / name) == ["train", "val"]


# --- what the library `datasets` reads -------------------------------------------------------------------------------


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replaces `load_hub` by a list of what it was called with."""
    calls: list[tuple] = []
    monkeypatch.setattr(load_module, "load_hub", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("name", ["owner/name", "name", "segments/sidewalk-semantic.v2"])
def test_an_id_goes_to_the_hub(name: str, hub_calls: list[tuple], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load(name, split="val", task="semantic", streaming=True, on_bad_sample="skip")
    assert hub_calls == [(name, "val", "semantic", {"streaming": True, "on_bad_sample": "skip"})]


@pytest.mark.parametrize("name", ["./data", "/data/set", "a/b/c", "data\\set", ""])
def test_a_path_is_no_id(name: str, hub_calls: list[tuple], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is not a folder; allowed|no split 'train' and no other"):
        load(name)
    assert not hub_calls


def test_folders_of_tables_and_columns_go_to_the_hub(
    hub_calls: list[tuple], tmp_path: Path, semantic_folder: Path
) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").touch()
    load(tmp_path / "tables")
    load(semantic_folder, columns={"image": "picture"})
    load(semantic_folder, format="hub")
    assert [Path(call[0]).name for call in hub_calls] == ["tables", "semantic", "semantic"]
    (semantic_folder / "train" / "extra.parquet").touch()  # a known shape comes first
    assert load(semantic_folder, cache_dir=str(tmp_path / "cache")).format == "semantic_maps"


def test_columns_are_no_option_of_other_formats(semantic_folder: Path) -> None:
    with pytest.raises(
        ValueError, match="option 'columns' is not known for format semantic_maps, allowed: ignore_ind"
    ):
        load(semantic_folder, format="semantic_maps", columns={"image": "picture"})


# --- readers, opened by their layout ---------------------------------------------------------------------------------


def test_a_layout_is_opened_without_the_options_of_images(semantic_folder: Path, cache_dir: str) -> None:
    layout = find_layouts(semantic_folder, "train")[0]
    options = {"ignore_index": 2, "intensity_range": (0, 9), "cache_dir": cache_dir}
    with pytest.raises(ValueError, match="ignore_index 2 is also the label 'sky'"):
        open_source(layout, semantic_folder, options, Problems())
    source = open_source(layout, semantic_folder, {**options, "ignore_index": 255}, Problems())
    assert len(list(source.rows())) == 2
    with pytest.raises(ValueError, match="option 'seed' is not known for format semantic_maps"):
        open_source(layout, semantic_folder, {"seed": 1}, Problems())


def test_problems_that_were_stored_are_logged_again(
    object_folder: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    masks = object_folder / "train" / "a" / "masks"
    Image.new("L", (8, 6)).save(masks / "m0.png")
    for _ in range(2):
        caplog.clear()
        load(object_folder, cache_dir=cache_dir)
        assert "m0.png: has no pixel inside and is not used" in caplog.text


@pytest.mark.parametrize(
    ("folder", "inside"),
    [("yolo_folder", "."), ("object_folder", "train"), ("object_folder", "pairs"), ("semantic_folder", "train")],
)
def test_a_relative_root(
    folder: str, inside: str, cache_dir: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(folder)
    if folder == "yolo_folder":  # one split: images/ and labels/
        for part in ("images", "labels"):
            for file in (root / part / "train").iterdir():
                file.rename(root / part / file.name)
            shutil.rmtree(root / part / "train")
            shutil.rmtree(root / part / "val")
    if inside == "pairs":  # images/NAME.png and masks/NAME/
        shutil.copytree(root / "train" / "a" / "images", root / "pairs" / "images")
        shutil.copytree(root / "train" / "a" / "masks", root / "pairs" / "masks" / "a")
    expected = [row["file_name"] for row in load(root / inside, split=None, cache_dir=cache_dir).rows()]
    monkeypatch.chdir(root / inside)
    assert [row["file_name"] for row in load(".", split=None, cache_dir=cache_dir).rows()] == expected
    assert inspect_dataset(".").splits[0].images == len(expected)
