"""YOLO segmentation text files: polygons by hand, classes from data.yaml, and every kind of broken line."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.load import find_layouts, list_splits, load
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.yolo_seg import yolo_seg_source
from hf_maskformer.model.masks import decode_rle, polygons_to_mask

TEXT, IMAGE = "labels/train/a.txt", "images/train/a.png"
TRIANGLE = "0 0 0 0.5 0 0 0.5"


def masks_of(row: dict) -> np.ndarray:
    return np.array([decode_rle({"size": [6, 8], "counts": segment["rle"]}) for segment in row["segments"]])


def test_polygons_are_filled_and_may_overlap(yolo_folder: Path, cache_dir: str) -> None:
    assert list_splits(yolo_folder) == ["train", "val"]
    data = load(yolo_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("yolo_seg", "instance", 3)
    assert data.label_spec.id2label == {0: "cat", 1: "dog"}
    assert data.label_spec.thing_label_ids == (0, 1)
    row = data.row(0)
    assert (row["image_id"], row["file_name"]) == ("a", "images/train/a.png")
    assert [(s["id"], s["label_id"], s["iscrowd"], s["area"]) for s in row["segments"]] == [
        (1, 1, False, 12),
        (3, 0, False, 16),
    ]
    expected = np.zeros((2, 6, 8), dtype=bool)
    expected[0, 0:3, 0:4] = True
    expected[1, 1:5, 2:6] = True
    np.testing.assert_array_equal(masks_of(row), expected)
    assert [len(data.row(index)["segments"]) for index in (1, 2)] == [0, 0]


def test_every_task_is_derived(yolo_folder: Path, cache_dir: str) -> None:
    assert load(yolo_folder, cache_dir=cache_dir).sample(0).class_labels.tolist() == [1, 0]
    semantic = load(yolo_folder, task="semantic", cache_dir=cache_dir)
    assert semantic.sample(0).class_labels.tolist() == [0, 1, 2]
    assert np.unique(semantic.reference(0)).tolist() == [0, 1, 2]
    assert semantic.label_spec.id2label[2] == "background"
    with pytest.raises(ValueError, match="task 'panoptic' is not possible with format yolo_seg"):
        load(yolo_folder, task="panoptic", cache_dir=cache_dir)


def test_curves_cover_the_pixels_of_coco_polygons(yolo_folder: Path, read_rows: Callable) -> None:
    points = np.array([0.1, 0.05, 0.93, 0.3, 0.61, 0.97, 0.2, 0.6])
    (yolo_folder / TEXT).write_text("0 " + " ".join(map(str, points)))
    rows, _ = read_rows(yolo_folder, "raise")
    expected = polygons_to_mask([(points.reshape(-1, 2) * (8, 6)).reshape(-1)], 6, 8)
    np.testing.assert_array_equal(masks_of(rows[0]), expected[None])


def test_the_other_order_of_folders(yolo_folder: Path, cache_dir: str) -> None:
    for split in ("train", "val"):
        (yolo_folder / split).mkdir()
        for part in ("images", "labels"):
            (yolo_folder / part / split).rename(yolo_folder / split / part)
    for part in ("images", "labels"):
        (yolo_folder / part).rmdir()
    (yolo_folder / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnames: {0: cat, 1: dog}\n")
    assert list_splits(yolo_folder) == ["train", "val"]
    data = load(yolo_folder, cache_dir=cache_dir)
    assert (data.format, len(data), data.label_spec.id2label) == ("yolo_seg", 3, {0: "cat", 1: "dog"})


@pytest.mark.parametrize("base", ["elsewhere", None])
def test_data_yaml_says_where_a_split_lies(base: str | None, yolo_folder: Path, cache_dir: str) -> None:
    (yolo_folder / "elsewhere" / "a").mkdir(parents=True)
    for part in ("images", "labels"):
        (yolo_folder / part).rename(yolo_folder / "elsewhere" / "a" / part)
    folder, prefix = ("elsewhere", "") if base else ("", "elsewhere/")
    lines = [f"path: {folder}"] if base else []
    lines += [f"train: {prefix}a/images/train", "val: nowhere", "names: [cat, dog]"]
    (yolo_folder / "data.yaml").write_text("\n".join(lines))
    assert list_splits(yolo_folder) == ["train"]
    assert len(load(yolo_folder, cache_dir=cache_dir)) == 3


def test_a_split_alone(yolo_folder: Path, cache_dir: str) -> None:
    (yolo_folder / "train").mkdir()
    for part in ("images", "labels"):
        (yolo_folder / part / "train").rename(yolo_folder / "train" / part)
    assert load(yolo_folder / "train", split=None, cache_dir=cache_dir).label_spec.id2label[1] == "dog"


def test_text_files_and_label_maps_in_one_folder(yolo_folder: Path, cache_dir: str) -> None:
    Image.fromarray(np.zeros((6, 8), dtype=np.uint8)).save(yolo_folder / "labels" / "train" / "a.png")
    assert [layout.format for layout in find_layouts(yolo_folder, "train")] == ["yolo_seg", "semantic_maps"]
    assert [layout.format for layout in find_layouts(yolo_folder, "train", "semantic")] == [
        "semantic_maps",
        "yolo_seg",
    ]


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_inferred_from_all_splits(yolo_folder: Path, read_rows: Callable, cache_dir: str) -> None:
    (yolo_folder / "data.yaml").unlink()
    (yolo_folder / "labels" / "val" / "b.txt").write_text("2 0 0 0.5 0 0.5 0.5\n")
    _, problems = read_rows(yolo_folder, "raise")
    assert [problem.kind for problem in problems.found] == ["missing_file"]
    assert "no data.yaml names the classes; 0..2 are taken" in problems.found[0].message
    names = {0: "label_0", 1: "label_1", 2: "label_2"}
    assert load(yolo_folder, cache_dir=cache_dir).label_spec.id2label == names
    (yolo_folder / "labels" / "val" / "b.txt").write_text("7 0 0 0.5 0 0.5 0.5\n")
    with pytest.raises(ValueError, match=r"those found, \[0, 1, 7\], are not 0\.\.K-1"):
        load(yolo_folder, cache_dir=cache_dir)


def test_after_a_gap_the_other_classes_are_read(yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / "data.yaml").unlink()
    (yolo_folder / TEXT).write_text(f"{TRIANGLE}\n7 0 0 0.5 0 0.5 0.5\n1 0 0 0.5 0 0.5 0.5")
    rows, problems = read_rows(yolo_folder, "list")
    assert [problem.kind for problem in problems.found] == ["unknown_label", "missing_file", "unknown_label"]
    assert "a.txt: line 2: class 7 is not known, allowed: 0..1" in problems.found[2].message
    assert [segment["id"] for segment in rows[0]["segments"]] == [1, 3]


def test_classes_txt_names_the_classes(yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / "data.yaml").unlink()
    (yolo_folder / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    source = yolo_seg_source(yolo_folder / "images" / "train", yolo_folder / "labels" / "train", Problems())
    assert source.label_spec.id2label == {0: "cat", 1: "dog"}
    assert len(list(source.rows())) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog\n", r"classes\.txt: line 2 is empty, each line must name a class"),
        (b"\n\n", r"classes\.txt: is empty"),
        ("cat\ndog\n".encode("utf-16"), r"classes\.txt: is no UTF-8 text"),
    ],
)
def test_a_broken_classes_txt(content: bytes, message: str, yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / "data.yaml").unlink()
    names = yolo_folder / "labels" / "train" / "classes.txt"
    names.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(yolo_folder, "raise")
    _, problems = read_rows(yolo_folder, "list")
    assert [problem.kind for problem in problems.found] == ["broken_record", "missing_file"]
    names.write_text("cat\ndog\n\n \n")  # empty lines at the end name nothing
    assert read_rows(yolo_folder, "raise")[1].found == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b", "is not valid YAML"),
        ("just text", "must be an object with names"),
        ("names: {1: a, 2: b}", r"names must have the keys 0\.\.1, found \[1, 2\]"),
        ("names: []", r"names must be a list of class names .*found \[\]"),
    ],
)
def test_a_broken_data_yaml(text: str, message: str, yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.yaml: {message}"):
        read_rows(yolo_folder, "raise")
    rows, problems = read_rows(yolo_folder, "list")  # the classes are then taken from the labels
    assert [problem.kind for problem in problems.found] == ["broken_record", "missing_file"]
    assert re.search(message, problems.found[0].message)
    assert len(rows[0]["segments"]) == 2


def test_a_wrong_number_of_classes(yolo_folder: Path, check_problem: Callable) -> None:
    (yolo_folder / "data.yaml").write_text("nc: 3\nnames: [cat, dog]\n")
    rows = check_problem(yolo_folder, "broken_record", "data.yaml", r"data\.yaml: nc is 3, but names has 2 names")
    assert len(rows) == 3


# --- broken lines and files ------------------------------------------------------------------------------------------

LINES = {
    "box": ("0 0.5 0.5 0.2 0.2", "broken_mask", "line 2: is a detection box"),
    "odd": ("0 0 0 0.5 0 0.5 0.5 0.1", "broken_mask", "line 2: has 7 coordinates; allowed: an even number"),
    "two points": ("0 0 0", "broken_mask", "line 2: has 2 coordinates; allowed: .* 3 or more points"),
    "class only": ("0", "broken_mask", "line 2: has 0 coordinates"),
    "pixels": ("0 0 0 4 0 4 4", "broken_mask", r"line 2: coordinate 4 is outside 0\.\.1"),
    "negative": ("0 -0.02 0 0.4 0 0.4 0.4", "broken_mask", r"line 2: coordinate -0\.02 is outside 0\.\.1"),
    "nan": ("0 nan 0 0.4 0 0.4 0.4", "broken_mask", "line 2: 'nan' is no finite number"),
    "word": ("0 x 0 0.4 0 0.4 0.4", "broken_mask", "line 2: 'x' is no finite number"),
    "class name": ("cat 0 0 0.4 0 0.4 0.4", "broken_mask", "line 2: 'cat' is no finite number"),
    "unknown class": ("2 0 0 0.4 0 0.4 0.4", "unknown_label", r"line 2: class 2 is not known, allowed: 0\.\.1"),
    "half class": ("0.5 0 0 0.4 0 0.4 0.4", "unknown_label", r"line 2: class 0\.5 is not known"),
}


@pytest.mark.parametrize("name", list(LINES))
def test_a_broken_line_is_raised_or_listed(name: str, yolo_folder: Path, check_problem: Callable) -> None:
    line, kind, message = LINES[name]
    (yolo_folder / TEXT).write_text(f"{TRIANGLE}\n{line}\n{TRIANGLE.replace('0.5', '0.9')}\n")
    rows = check_problem(yolo_folder, kind, TEXT, rf"a\.txt: {message}")
    assert len(rows) == 3
    assert [segment["id"] for segment in rows[0]["segments"]] == [1, 3]


FILES = {
    "no image": (lambda root: (root / IMAGE).unlink(), "missing_file", TEXT, r"a\.txt: has no image in", 2),
    "empty image": (lambda root: (root / IMAGE).write_bytes(b""), "unreadable_file", IMAGE, "cannot be read", 2),
    "binary text": (
        lambda root: (root / TEXT).write_bytes(b"\xff\xfe0"),
        "unreadable_file",
        TEXT,
        r"a\.txt: is no UTF-8",
        2,
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_broken_file_is_raised_or_listed(name: str, yolo_folder: Path, check_problem: Callable) -> None:
    damage, kind, file, message, rows_left = FILES[name]
    damage(yolo_folder)
    assert len(check_problem(yolo_folder, kind, file, message)) == rows_left


@pytest.mark.parametrize(
    ("text", "kind", "message", "segments"),
    [
        (f"{TRIANGLE}\n{TRIANGLE}", "duplicate", "image a: annotations of line 1 and of line 2 have one class", 2),
        ("0 0.01 0.01 0.02 0.01 0.02 0.02", "empty_mask", "line 1: the polygon covers no pixel", 0),
    ],
)
def test_warnings(text: str, kind: str, message: str, segments: int, yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / TEXT).write_text(text)
    rows, problems = read_rows(yolo_folder, "raise")
    assert [(problem.kind, problem.file) for problem in problems.found] == [(kind, str(yolo_folder / TEXT))]
    assert message in problems.found[0].message
    assert len(rows[0]["segments"]) == segments


def test_a_text_file_in_upper_case_is_read(yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / TEXT).rename(yolo_folder / "labels" / "train" / "a.TXT")
    rows, problems = read_rows(yolo_folder, "raise")
    assert ([segment["label_id"] for segment in rows[0]["segments"]], problems.found) == ([1, 0], [])


def test_two_text_files_of_one_name(yolo_folder: Path, check_problem: Callable) -> None:
    (yolo_folder / "labels" / "train" / "a.TXT").write_text(TRIANGLE)
    rows = check_problem(yolo_folder, "duplicate", TEXT, r"holds a\.TXT and a\.txt: one name")
    assert len(rows[0]["segments"]) == 1


def test_folders_among_images_and_labels_are_reported(yolo_folder: Path, read_rows: Callable) -> None:
    for file in (IMAGE, TEXT):
        inside = (yolo_folder / file).parent / "sub"
        inside.mkdir()
        (yolo_folder / file).rename(inside / Path(file).name)
    rows, problems = read_rows(yolo_folder, "raise")
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unlisted_file", str(yolo_folder / part / "train" / "sub")) for part in ("images", "labels")
    ]
    assert [row["image_id"] for row in rows] == ["b", "c"]


@pytest.mark.parametrize("root", [".", "../train"])
def test_a_relative_root(root: str, yolo_folder: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (yolo_folder / "train").mkdir()
    for part in ("images", "labels"):
        (yolo_folder / part / "train").rename(yolo_folder / "train" / part)
    monkeypatch.chdir(yolo_folder / "train")
    rows, _ = read_rows(Path(root), "raise", split=None)
    assert (rows[0]["file_name"], len(rows[0]["segments"])) == ("train/images/a.png", 2)
    assert rows[0]["image"]["path"] == str(yolo_folder / "train" / "images" / "a.png")


def test_rounding_is_clipped(yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / TEXT).write_text("0 -0.001 0 1.002 0 1.002 1.001 -0.001 1.001")
    rows, problems = read_rows(yolo_folder, "raise")
    assert rows[0]["segments"][0]["area"] == 48
    assert not problems.found


def test_a_byte_order_mark_is_no_class(yolo_folder: Path, read_rows: Callable) -> None:
    (yolo_folder / TEXT).write_text(TRIANGLE, encoding="utf-8-sig")
    rows, problems = read_rows(yolo_folder, "raise")
    assert ([segment["label_id"] for segment in rows[0]["segments"]], problems.found) == ([0], [])


def test_images_without_any_text_file(yolo_folder: Path, read_rows: Callable) -> None:
    for file in (yolo_folder / "labels" / "train").iterdir():
        file.rename(file.with_name(f"other_{file.name}"))
    with pytest.raises(ValueError, match=r"labels/train holds no text file NAME\.txt for any of the 3 images"):
        read_rows(yolo_folder, "list")


def test_a_changed_line_changes_the_rows(yolo_folder: Path, cache_dir: str) -> None:
    assert len(load(yolo_folder, cache_dir=cache_dir).row(0)["segments"]) == 2
    (yolo_folder / TEXT).write_text(TRIANGLE)
    assert len(load(yolo_folder, cache_dir=cache_dir).row(0)["segments"]) == 1
