"""Formats are found by the folder's shape; everything else is an error that says what was found."""

from pathlib import Path

import pytest

from hf_maskformer.data.load import list_splits, load


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
    with pytest.raises(
        ValueError, match="task 'instance' is not possible with format semantic_maps, allowed: semantic"
    ):
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


def test_volumes_are_refused_by_what_was_found(shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"images holds no file that ends with \.jpg.*\.nii\.gz"):
        load(shared_data / "hippocampus")
