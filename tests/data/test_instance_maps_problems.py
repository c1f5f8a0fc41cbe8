"""Maps of object ids: what can be wrong with them, by file and value, and how it is inspected."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.id_map_files import IMAGE, MAP, as_cellpose, write_tiff
from hf_maskformer.cli.main import main
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.load import load


def several_pages(file: Path) -> None:
    pages = [Image.new("L", (8, 6), value) for value in (1, 2, 3)]
    pages[0].save(file, format="TIFF", save_all=True, append_images=pages[1:])


def floats(value: float) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        values = np.ones((6, 8), dtype=np.float32)
        values[2, 3] = value
        Image.fromarray(values).save(file, format="TIFF")

    return write


def with_value(value: int, dtype: type) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        values = np.ones((6, 8), dtype=dtype)
        values[2, 3] = value
        write_tiff(file, values)

    return write


# What happens to the map of a.png, the kind of the problem and the words of its message.
MAP_BREAKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "colours": (
        lambda file: Image.new("RGB", (8, 6)).save(file),
        *("broken_mask", r"a\.png: is of mode RGB \(3 channels\); a map of ids has one channel"),
    ),
    "grey with alpha": (lambda file: Image.new("LA", (8, 6)).save(file), "broken_mask", r"a\.png: is of mode LA"),
    "a fraction": (floats(1.5), "broken_mask", r"a\.png: holds the value 1\.5, ids of objects are whole"),
    "nan": (floats(float("nan")), "broken_mask", r"a\.png: holds the value nan"),
    "infinite": (floats(float("inf")), "broken_mask", r"a\.png: holds the value inf"),
    "negative float": (floats(-2), "broken_mask", r"a\.png: holds the value -2, which is no id: those are 0 \(no"),
    "negative": (with_value(-5, np.int32), "broken_mask", r"a\.png: holds the value -5, which is no id"),
    "negative, 16 bits": (with_value(-1, np.int16), "broken_mask", r"a\.png: holds the value -1, which is no id"),
    "above 31 bits": (with_value(2**32 - 3, np.uint32), "broken_mask", r"holds the value -3, .* to 2147483647"),
    "no image": (lambda file: file.write_bytes(b"no image"), "unreadable_file", r"a\.png: cannot be read as an image"),
    "empty": (lambda file: file.write_bytes(b""), "unreadable_file", r"a\.png: cannot be read as an image"),
    "cut off": (
        lambda file: file.write_bytes(file.read_bytes()[:-30]),
        *("unreadable_file", r"a\.png: cannot be read as an image, it is damaged or cut off"),
    ),
    "64 bits": (
        lambda file: with_value(3, np.int64)(file.with_suffix(".tif")) or file.unlink(),
        *("unreadable_file", r"a\.tif: cannot be read .*; a TIFF of 64-bit numbers cannot be read: save ids with 16"),
    ),
    "pages": (several_pages, "unreadable_file", r"a\.png: TIFF file of 3 pages; an image has one"),
}


@pytest.mark.parametrize("name", list(MAP_BREAKS))
def test_a_broken_map_is_raised_or_listed(name: str, id_map_folder: Path, check_problem: Callable) -> None:
    damage, kind, message = MAP_BREAKS[name]
    damage(id_map_folder / MAP)
    _mixed(id_map_folder)
    file = "train/instance_maps/a.tif" if name == "64 bits" else MAP
    rows = check_problem(id_map_folder, kind, file, message)
    assert [row["image_id"] for row in rows] == ["b"]


def _mixed(root: Path) -> None:
    """Gives b the object 9, so that one white object is not all that is left."""
    Image.new("L", (8, 6), 9).save(root / "train" / "instance_maps" / "b.png")


# Damage of the split, the kind of the problem, its file, the words of its message and the images that are left.
FILE_BREAKS: dict[str, tuple[Callable[[Path], object], str, str, str, list[str]]] = {
    "other size": (
        lambda split: Image.new("L", (9, 6), 1).save(split / "instance_maps/a.png"),
        *("size_mismatch", IMAGE, r"a\.png is 8x6 \(width x height\), but .*instance_maps/a\.png is 9x6", ["b"]),
    ),
    "broken image": (
        lambda split: (split / "images/a.png").write_bytes(b""),
        *("unreadable_file", IMAGE, r"images/a\.png: cannot be read as an image", ["b"]),
    ),
    "no map": (
        lambda split: (split / "instance_maps/a.png").unlink(),
        *("missing_file", IMAGE, r"images/a\.png: has no map in \S*instance_maps \(an image without objects", ["b"]),
    ),
    "no image": (
        lambda split: (split / "images/a.png").unlink(),
        *("missing_file", MAP, r"instance_maps/a\.png: has no image in \S*images", ["b"]),
    ),
    "lossy map": (
        lambda split: (split / "instance_maps/a.png").rename(split / "instance_maps/a.jpg"),
        *("unknown_label", "train/instance_maps/a.jpg", r"a\.jpg: \.jpg files change the values of pixels", ["b"]),
    ),
    "two images": (
        lambda split: shutil.copy(split / "images/a.png", split / "images/a.tif"),
        *("duplicate", "train/images/a.tif", r"holds a\.png and a\.tif: one name, two files", ["a", "b"]),
    ),
    "two maps": (
        lambda split: shutil.copy(split / "instance_maps/a.png", split / "instance_maps/a.bmp"),
        *("duplicate", MAP, r"holds a\.bmp and a\.png: one name, two files", ["a", "b"]),
    ),
}


NAMED_BREAKS: dict[str, tuple[Callable[[Path], object], str, str, str, list[str]]] = {
    "no map": (
        lambda split: (split / "a_masks.png").unlink(),
        *("missing_file", "train/a_img.png", r"a_img\.png: has no map in \S*train", ["b_img"]),
    ),
    "no image": (
        lambda split: (split / "a_img.png").unlink(),
        *("missing_file", "train/a_masks.png", r"a_masks\.png: has no image in \S*train", ["b_img"]),
    ),
    "lossy map": (
        lambda split: (split / "a_masks.png").rename(split / "a_masks.JPEG"),
        *("unknown_label", "train/a_masks.JPEG", r"a_masks\.JPEG: \.JPEG files change", ["b_img"]),
    ),
    "two maps": (
        lambda split: shutil.copy(split / "a_masks.png", split / "a_img_cp_masks.png"),
        *("duplicate", "train/a_masks.png", r"holds a_img_cp_masks\.png and a_masks\.png: one", ["a_img", "b_img"]),
    ),
    "two images": (
        lambda split: shutil.copy(split / "a_img.png", split / "a.png"),
        *("duplicate", "train/a_img.png", r"holds a\.png and a_img\.png: one name, two files", ["a", "b_img"]),
    ),
}


BREAKS = {"two folders": FILE_BREAKS, "one folder": NAMED_BREAKS}


@pytest.mark.parametrize(
    ("breaks", "name"),
    [(breaks, name) for breaks in ("two folders", "one folder") for name in BREAKS[breaks]],
)
def test_files_that_do_not_fit(breaks: str, name: str, id_map_folder: Path, check_problem: Callable) -> None:
    damage, kind, file, message, left = BREAKS[breaks][name]
    _mixed(id_map_folder)
    folder = id_map_folder if breaks == "two folders" else as_cellpose(id_map_folder)
    damage(folder / "train")
    rows = check_problem(id_map_folder, kind, file, message)
    assert [row["image_id"] for row in rows] == left


def test_a_folder_without_maps_is_an_error_in_every_mode(id_map_folder: Path, read_rows: Callable) -> None:
    for file in (id_map_folder / "train" / "instance_maps").iterdir():
        file.rename(file.with_name(f"other_{file.name}"))
    with pytest.raises(ValueError, match=r"a\.png: has no map in"):
        read_rows(id_map_folder, "raise")
    with pytest.raises(ValueError, match="images holds no image with a map of its objects"):
        read_rows(id_map_folder, "list")
    shutil.rmtree(id_map_folder / "train" / "instance_maps")
    (id_map_folder / "train" / "instance_maps").mkdir()
    with pytest.raises(ValueError, match=r"instance_maps holds no file that ends with \.png, .*; it is empty"):
        read_rows(id_map_folder, "list")


def test_a_map_that_cannot_be_read_may_be_left_out(id_map_folder: Path, cache_dir: str) -> None:
    (id_map_folder / MAP).write_bytes(b"not an image")
    data = load(id_map_folder, on_bad_sample="skip", cache_dir=cache_dir)
    assert [data.row(index)["image_id"] for index in range(len(data))] == ["b"]
    assert [problem.file for problem in data.left_out] == [str(id_map_folder / MAP)]


def test_other_files_and_folders_are_reported(id_map_folder: Path, read_rows: Callable) -> None:
    maps = id_map_folder / "train" / "instance_maps"
    (maps / "notes.txt").write_text("x")
    shutil.copytree(id_map_folder / "train" / "images", maps / "more")
    rows, problems = read_rows(id_map_folder, "raise")
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [
        ("unlisted_file", "notes.txt"),
        ("unlisted_file", "more"),
    ]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ((0, 255), (0, 255), True),
        ((0, 255), (0,), True),
        ((255,), (0, 255), True),
        ((0, 255), (0, 7), False),
        ((0, 255), (0, 254, 255), False),
        ((0, 254, 255), (0, 255), False),
        ((0,), (0,), False),
        ((0, 1), (0, 1), False),
    ],
)
def test_black_and_white_masks_are_warned_of(
    first: tuple[int, ...], second: tuple[int, ...], warned: bool, id_map_folder: Path, read_rows: Callable
) -> None:
    maps = id_map_folder / "train" / "instance_maps"
    for name, values in (("a", first), ("b", second)):
        Image.fromarray(np.resize(np.array(values, dtype=np.uint8), (6, 8))).save(maps / f"{name}.png")
    rows, problems = read_rows(id_map_folder, "raise")
    assert len(rows) == 2
    expected = [("unknown_label", str(maps))] if warned else []
    assert [(problem.kind, problem.file) for problem in problems.found] == expected
    assert all("no map holds more than one object, and that has the value 255" in p.message for p in problems.found)


def test_the_warning_is_kept_with_the_index(
    id_map_folder: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (id_map_folder / "train" / "instance_maps").iterdir():
        Image.new("L", (8, 6), 255).save(file)
    for _ in range(2):
        caplog.clear()
        load(id_map_folder, cache_dir=cache_dir)
        assert caplog.text.count("they look like black and white masks") == 1


def test_the_index_is_made_anew_when_a_map_or_the_class_changes(id_map_folder: Path, cache_dir: str) -> None:
    assert len(load(id_map_folder, cache_dir=cache_dir).row(0)["segments"]) == 2
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(id_map_folder / MAP)
    assert len(load(id_map_folder, cache_dir=cache_dir).row(0)["segments"]) == 47
    assert load(id_map_folder, class_name="cell", cache_dir=cache_dir).label_spec.id2label == {0: "cell"}


# --- inspection and command line -------------------------------------------------------------------------------------


def test_the_inspection_lists_every_problem(id_map_folder: Path) -> None:
    split = id_map_folder / "train"
    for number, name in enumerate("defghi"):
        Image.new("RGB", (8, 6), (number, 200, 3)).save(split / "images" / f"{name}.png")
        Image.new("L", (8, 6), number + 1).save(split / "instance_maps" / f"{name}.png")
    maps = split / "instance_maps"
    Image.new("RGB", (8, 6)).save(maps / "d.png")
    with_value(-5, np.int32)(maps / "e.png")
    Image.new("L", (7, 6)).save(maps / "f.png")
    (maps / "g.png").write_bytes(b"")
    (maps / "h.png").rename(maps / "h.jpg")
    (maps / "i.png").unlink()
    (split / "notes.txt").write_text("beside the folders, which nobody reads")
    (maps / "notes.txt").write_text("x")
    report = inspect_dataset(id_map_folder)
    found = {(entry.problem.kind, Path(entry.problem.file).name, entry.refused) for entry in report.problems}
    assert found == {
        ("broken_mask", "d.png", True),
        ("broken_mask", "e.png", True),
        ("size_mismatch", "f.png", True),
        ("unreadable_file", "g.png", True),
        ("unknown_label", "h.jpg", True),
        ("missing_file", "i.png", True),
        ("unlisted_file", "notes.txt", False),
    }
    assert len(report.problems) == len(found)
    (train, val) = report.splits
    assert (train.images, train.classes[0].segments, val.images, val.classes[0].segments) == (2, 3, 1, 2)


def test_the_command_line_takes_the_format(
    id_map_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (id_map_folder / split / "instance_maps").rename(id_map_folder / split / "masks")
    words = [
        "inspect-dataset",
        str(id_map_folder),
        "--format",
        "instance_maps",
        "--dataset-options",
        "class_name=cell",
    ]
    main([*words, "--strict"])
    shown = capsys.readouterr().out
    assert "instance_maps" in shown
    assert "cell" in shown
