"""ADE20K trees: 0 is void, 1..150 are the classes; names from objectInfo150.txt."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.load import find_layouts, list_splits, load
from hf_maskformer.model.masks import ids_to_panoptic_png

LABELS, IMAGE = "annotations/training/a.png", "images/training/a.jpg"


@pytest.mark.parametrize("split", ["training", "train"])
def test_values_become_labels(split: str, ade20k_folder: Path, cache_dir: str) -> None:
    assert list_splits(ade20k_folder) == ["training", "validation"]
    data = load(ade20k_folder, split=split, cache_dir=cache_dir)
    assert (data.format, data.task, len(data), data.label_spec.num_labels) == ("ade20k", "semantic", 2, 150)
    row = data.row(0)
    assert (row["image_id"], row["file_name"]) == ("a", "images/training/a.jpg")
    assert [(s["id"], s["label_id"], s["area"]) for s in row["segments"]] == [(1, 0, 36), (150, 149, 6)]
    reference = data.reference(0)
    assert reference[0].tolist() == [255, 0, 0, 0, 0, 0, 0, 149]
    assert data.sample(0).class_labels.tolist() == [0, 149]


def test_the_first_name_is_taken_unless_two_classes_share_it(ade20k_folder: Path, cache_dir: str) -> None:
    names = load(ade20k_folder, split="val", cache_dir=cache_dir).label_spec.id2label
    assert list(names.values())[:5] == ["wall", "building", "screen, silver screen", "screen, CRT screen", "class 5"]


def test_without_the_list_of_names_a_warning_says_so(ade20k_folder: Path, read_rows: Callable, cache_dir: str) -> None:
    (ade20k_folder / "objectInfo150.txt").unlink()
    _, problems = read_rows(ade20k_folder, "raise")
    assert [problem.kind for problem in problems.found] == ["missing_file"]
    names = load(ade20k_folder, cache_dir=cache_dir).label_spec.id2label
    assert (names[0], names[149]) == ("label_1", "label_150")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "must have the columns Idx and Name"),
        (lambda text: text.replace("\n7\t", "\n9\t"), "line 8 must have Idx 7 and a Name, found '9"),
        (lambda text: text[: text.index("\n150\t")], "names 149 classes, ADE20K has 150"),
        (lambda text: text.encode("utf-16"), "is no UTF-8 text"),
    ],
)
def test_a_broken_list_of_names(
    change: Callable[[str], str | bytes], message: str, ade20k_folder: Path, check_problem: Callable
) -> None:
    file = ade20k_folder / "objectInfo150.txt"
    changed = change(file.read_text())
    file.write_bytes(changed.encode() if isinstance(changed, str) else changed)
    rows = check_problem(ade20k_folder, "broken_record", "objectInfo150.txt", rf"objectInfo150\.txt: {message}")
    assert len(rows) == 2


def set_pixel(root: Path) -> None:
    values = np.array(Image.open(root / LABELS))
    values[0, 3] = 151
    Image.fromarray(values).save(root / LABELS)


BREAKS = {
    "unknown value": (set_pixel, "unknown_label", LABELS, r"a\.png: value 151 is no ADE20K label, allowed: 0", 2),
    "no image": (lambda root: (root / IMAGE).unlink(), "missing_file", LABELS, r"a\.png: has no image in .*ing", 1),
    "no labels": (lambda root: (root / LABELS).unlink(), "missing_file", IMAGE, r"a\.jpg: has no PNG in", 1),
    "empty image": (lambda root: (root / IMAGE).write_bytes(b""), "unreadable_file", IMAGE, "cannot be read", 1),
    "empty labels": (lambda root: (root / LABELS).write_bytes(b""), "unreadable_file", LABELS, "cannot be read", 1),
    "other size": (
        lambda root: Image.new("RGB", (9, 6)).save(root / IMAGE),
        *("size_mismatch", IMAGE, r"a\.jpg is 9x6 .*a\.png is 8x6", 1),
    ),
}


@pytest.mark.parametrize("name", list(BREAKS))
def test_what_is_broken_is_raised_or_listed(name: str, ade20k_folder: Path, check_problem: Callable) -> None:
    damage, kind, file, message, rows_left = BREAKS[name]
    damage(ade20k_folder)
    rows = check_problem(ade20k_folder, kind, file, message)
    assert len(rows) == rows_left


def test_unlisted_and_doubled_files(ade20k_folder: Path, check_problem: Callable, read_rows: Callable) -> None:
    (ade20k_folder / "images" / "training" / "notes.txt").write_text("x")
    _, problems = read_rows(ade20k_folder, "raise")
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [("unlisted_file", "notes.txt")]
    (ade20k_folder / "images" / "training" / "notes.txt").unlink()
    Image.new("RGB", (8, 6)).save(ade20k_folder / "images" / "training" / "a.png")
    rows = check_problem(ade20k_folder, "duplicate", "images/training/a.png", "holds a.jpg and a.png: one name")
    assert len(rows) == 2


def test_folders_among_the_files_are_reported(ade20k_folder: Path, read_rows: Callable) -> None:
    for file in (IMAGE, LABELS):
        (ade20k_folder / file).parent.joinpath("sub").mkdir()
        (ade20k_folder / file).rename((ade20k_folder / file).parent / "sub" / Path(file).name)
    rows, problems = read_rows(ade20k_folder, "raise")
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unlisted_file", str((ade20k_folder / file).parent / "sub")) for file in (IMAGE, LABELS)
    ]
    assert [row["image_id"] for row in rows] == ["b"]


def test_a_relative_root(ade20k_folder: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = read_rows(ade20k_folder, "raise")
    monkeypatch.chdir(ade20k_folder)
    assert read_rows(Path(), "raise")[0] == whole


def test_the_json_forms_are_read_as_coco(ade20k_folder: Path, cache_dir: str) -> None:
    records = [{"id": name, "file_name": f"{name}.jpg", "height": 6, "width": 8} for name in "ab"]
    ids = np.ones((6, 8), dtype=np.int32)
    ids[0, 0] = 2
    panoptic = ade20k_folder / "ade20k_panoptic_train"
    panoptic.mkdir()
    annotations = []
    for name in "ab":
        Image.fromarray(ids_to_panoptic_png(ids)).save(panoptic / f"{name}.png")
        segments = [{"id": 1, "category_id": 0, "iscrowd": 0}, {"id": 2, "category_id": 7, "iscrowd": 0}]
        annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": 0, "name": "wall", "isthing": 0}, {"id": 7, "name": "bed", "isthing": 1}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    panoptic.with_suffix(".json").write_text(json.dumps(content))
    boxes = [{"id": 4, "image_id": "a", "category_id": 7, "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]], "iscrowd": 0}]
    content = {"images": records, "annotations": boxes, "categories": categories[1:]}
    (ade20k_folder / "ade20k_instance_train.json").write_text(json.dumps(content))

    formats = [layout.format for layout in find_layouts(ade20k_folder, "train")]
    assert formats == ["coco_panoptic", "coco_instance", "ade20k"]
    data = load(ade20k_folder, cache_dir=cache_dir)
    assert (data.format, data.sample(0).class_labels.tolist()) == ("coco_panoptic", [1, 0])
    assert load(ade20k_folder, task="instance", cache_dir=cache_dir).format == "coco_instance"
    assert load(ade20k_folder, task="semantic", cache_dir=cache_dir).format == "ade20k"
