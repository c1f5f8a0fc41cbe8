"""Cityscapes trees: the official label table, things, crowds and void, and every kind of broken file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.cityscapes import CITYSCAPES_LABELS, cityscapes_label_spec
from hf_maskformer.data.load import list_splits, load
from hf_maskformer.model.masks import decode_rle, ids_to_panoptic_png

LABELS = "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
IMAGE = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"


def write_ids(file: Path, change: Callable[[np.ndarray], object]) -> None:
    ids = np.array(Image.open(file))
    change(ids)
    Image.fromarray(ids).save(file)


def as_class_maps(root: Path, ids: np.ndarray, ending: str) -> None:
    """Replaces the instance ids of the split train by one of the two kinds of class maps."""
    table = {7: 0, 26: 13, 24: 11, 4: 255, 29: 255}
    for file in (root / "gtFine" / "train").glob("*/*_instanceIds.png"):
        raw = np.array(Image.open(file))
        values = np.where(raw >= 1000, raw // 1000, raw)
        if ending == "labelTrainIds":
            values = np.vectorize(table.__getitem__)(values)
        Image.fromarray(values.astype(np.uint8)).save(file.with_name(file.name.replace("instanceIds", ending)))
        file.unlink()


def test_the_table_of_labels() -> None:
    spec = cityscapes_label_spec()
    assert [label.id for label in CITYSCAPES_LABELS] == list(range(34))
    names = (
        "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,"
        "truck,bus,train,motorcycle,bicycle"
    )
    assert list(spec.id2label.values()) == names.split(",")
    assert spec.thing_label_ids == tuple(range(11, 19))
    assert spec.raw_to_label is not None
    assert [spec.raw_to_label[raw] for raw in (0, 7, 8, 11, 24, 26, 29, 30, 31, 33)] == [
        *(255, 0, 1, 2, 11, 13, 255, 255, 16, 18)
    ]


def test_segments_are_the_values_of_the_file(cityscapes_folder: Path, cache_dir: str, cityscapes_ids) -> None:
    assert list_splits(cityscapes_folder) == ["test", "train", "val"]
    data = load(cityscapes_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("cityscapes", "panoptic", 2)
    row = data.row(0)
    assert row["image_id"] == "aachen_000000_000019"
    assert row["file_name"] == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    found = {s["id"]: (s["label_id"], s["iscrowd"], s["area"]) for s in row["segments"]}
    assert found == {
        7: (0, False, 48 - 4 - 4 - 8 - 3 - 3),
        24: (11, True, 8),
        26000: (13, False, 4),
        26001: (13, False, 4),
    }
    for segment in row["segments"]:
        mask = decode_rle({"size": [6, 8], "counts": segment["rle"]})
        np.testing.assert_array_equal(mask, cityscapes_ids == segment["id"])


def test_every_task_is_derived(cityscapes_folder: Path, cache_dir: str) -> None:
    panoptic = load(cityscapes_folder, cache_dir=cache_dir).sample(0)
    assert panoptic.class_labels.tolist() == [13, 13, 0]  # the crowd is no target
    instance = load(cityscapes_folder, task="instance", cache_dir=cache_dir)
    assert instance.sample(0).class_labels.tolist() == [13, 13]
    assert instance.reference(0)["iscrowd"].tolist() == [True, False, False]
    semantic = load(cityscapes_folder, task="semantic", cache_dir=cache_dir)
    assert semantic.sample(0).class_labels.tolist() == [0, 11, 13]
    assert np.unique(semantic.reference(0)).tolist() == [0, 11, 13, 255]


@pytest.mark.parametrize("ending", ["labelIds", "labelTrainIds"])
def test_class_maps_give_the_same_semantic_truth(
    ending: str, cityscapes_folder: Path, cityscapes_ids: np.ndarray, cache_dir: str
) -> None:
    expected = load(cityscapes_folder, task="semantic", cache_dir=cache_dir).reference(0)
    as_class_maps(cityscapes_folder, cityscapes_ids, ending)
    data = load(cityscapes_folder, cache_dir=cache_dir)
    assert data.task == "semantic"
    np.testing.assert_array_equal(data.reference(0), expected)
    segments = data.row(0)["segments"]
    assert not any(segment["iscrowd"] for segment in segments)
    assert min(segment["id"] for segment in segments) >= 1
    with pytest.raises(ValueError, match="task 'panoptic' is not possible with format cityscapes, allowed: semantic"):
        load(cityscapes_folder, task="panoptic", cache_dir=cache_dir)


def test_the_test_split_has_no_labels(cityscapes_folder: Path, cache_dir: str) -> None:
    with pytest.raises(ValueError, match=r"gtFine/test has no labels: no file .* are not public, choose train or val"):
        load(cityscapes_folder, split="test", cache_dir=cache_dir)
    shutil.copytree(cityscapes_folder / "gtFine" / "val", cityscapes_folder / "gtFine" / "test")
    for file in (cityscapes_folder / "gtFine" / "test").glob("*/*.png"):  # as the dataset's own package has them
        write_ids(file, lambda ids: ids.fill(3))
    with pytest.raises(ValueError, match=r"gtFine/test has no labels: the 2 files .* hold no evaluated class; .*val"):
        load(cityscapes_folder, split="test", cache_dir=cache_dir)


def fill(value: int) -> Callable[[Path], None]:
    def change(ids: np.ndarray) -> None:
        ids[0, 7] = value

    return lambda root: write_ids(root / LABELS, change)


BREAKS = {
    "unknown id": (
        fill(34),
        "unknown_label",
        LABELS,
        r"instanceIds\.png: value 34 is no Cityscapes label; allowed",
        2,
    ),
    "unknown class": (fill(40001), "unknown_label", LABELS, r"instanceIds\.png: value 40001 is no Cityscapes", 2),
    "numbered stuff": (fill(7001), "unknown_label", LABELS, r"value 7001 .* class 7 \(road\) has no instances", 2),
    "no image": (lambda root: (root / IMAGE).unlink(), "missing_file", LABELS, r"Ids\.png: has no image in", 1),
    "no labels": (lambda root: (root / LABELS).unlink(), "missing_file", IMAGE, r"Img8bit\.png: has no \*_gtFine", 1),
    "empty image": (lambda root: (root / IMAGE).write_bytes(b""), "unreadable_file", IMAGE, "cannot be read", 1),
    "empty labels": (lambda root: (root / LABELS).write_bytes(b""), "unreadable_file", LABELS, "cannot be read", 1),
    "other size": (
        lambda root: Image.new("RGB", (9, 6)).save(root / IMAGE),
        *("size_mismatch", IMAGE, r"is 9x6 .*instanceIds\.png is 8x6", 1),
    ),
    "colours": (
        lambda root: Image.new("RGB", (8, 6)).save(root / LABELS),
        *("broken_mask", LABELS, r"instanceIds\.png: label map of mode RGB", 1),
    ),
}


@pytest.mark.parametrize("name", list(BREAKS))
def test_what_is_broken_is_raised_or_listed(name: str, cityscapes_folder: Path, check_problem: Callable) -> None:
    damage, kind, file, message, rows_left = BREAKS[name]
    damage(cityscapes_folder)
    rows = check_problem(cityscapes_folder, kind, file, message)
    assert len(rows) == rows_left
    if rows_left == 2:  # only the segment of the value is missing
        assert [segment["id"] for segment in rows[0]["segments"]] == [7, 24, 26000, 26001]


def test_a_label_map_of_class_ids_has_no_numbers(
    cityscapes_folder: Path, cityscapes_ids: np.ndarray, check_problem: Callable
) -> None:
    as_class_maps(cityscapes_folder, cityscapes_ids, "labelTrainIds")
    file = LABELS.replace("instanceIds", "labelTrainIds")
    write_ids(cityscapes_folder / file, lambda ids: ids.__setitem__((0, 7), 19))
    check_problem(cityscapes_folder, "unknown_label", file, r"value 19 .* allowed: the train ids 0\.\.18 and 255")


def test_what_else_lies_among_the_images_is_reported(cityscapes_folder: Path, read_rows: Callable) -> None:
    city = (cityscapes_folder / IMAGE).parent
    others = [city.parent / "loose_leftImg8bit.png", city / "x_leftImg8bit.PNG", city / "x_leftImg8bit.jpg"]
    for file in (*others, city / "._x_leftImg8bit.png", city / "sub" / "x_leftImg8bit.png"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    rows, problems = read_rows(cityscapes_folder, "raise")
    assert {problem.file for problem in problems.found} == {str(file) for file in (*others, city / "sub")}
    assert {problem.kind for problem in problems.found} == {"unlisted_file"}
    assert len(rows) == 2


def test_a_relative_root(cityscapes_folder: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = read_rows(cityscapes_folder, "raise")
    monkeypatch.chdir(cityscapes_folder)
    assert read_rows(Path(), "raise")[0] == whole


def test_no_images(cityscapes_folder: Path, read_rows: Callable) -> None:
    (cityscapes_folder / IMAGE).unlink()
    (cityscapes_folder / IMAGE.replace("aachen", "bonn")).unlink()
    with pytest.raises(ValueError, match=r"leftImg8bit/train holds no CITY/\*_leftImg8bit\.png"):
        read_rows(cityscapes_folder, "list")


def test_the_panoptic_json_of_the_datasets_own_tools(
    cityscapes_folder: Path, cityscapes_ids: np.ndarray, cache_dir: str
) -> None:
    """Its file names lack the city's folder; the segments are those of the instance ids."""
    expected = load(cityscapes_folder, cache_dir=cache_dir).row(0)["segments"]
    maps = cityscapes_folder / "gtFine" / "cityscapes_panoptic_train"
    maps.mkdir()
    images, annotations = [], []
    for city, ids in (("aachen", cityscapes_ids), ("bonn", np.full_like(cityscapes_ids, 7))):
        name = f"{city}_000000_000019"
        kept = np.where(np.isin(ids, (4, 29000)), 0, ids)
        Image.fromarray(ids_to_panoptic_png(kept)).save(maps / f"{name}_gtFine_panoptic.png")
        values = np.unique(kept[kept > 0]).tolist()
        segments = [{"id": i, "category_id": i // 1000 if i >= 1000 else i, "iscrowd": int(i == 24)} for i in values]
        images.append({"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "height": 6, "width": 8})
        file = f"{name}_gtFine_panoptic.png"
        annotations.append({"image_id": name, "file_name": file, "segments_info": segments})
    categories = [
        {"id": label.id, "name": label.name, "isthing": int(label.is_thing)}
        for label in CITYSCAPES_LABELS
        if label.train_id != 255
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    maps.with_suffix(".json").write_text(json.dumps(content))
    data = load(cityscapes_folder, format="coco_panoptic", cache_dir=cache_dir)
    assert (len(data), data.row(0)["segments"]) == (2, expected)
