"""One PNG for each object: both shapes, overlap, class folders, ways to write a mask, and what can be broken."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.load import find_layouts, list_splits, load
from hf_maskformer.model.masks import decode_rle

MASK, IMAGE = "train/a/masks/m0.png", "train/a/images/a.png"


def masks_of(row: dict) -> np.ndarray:
    return np.array([decode_rle({"size": [6, 8], "counts": segment["rle"]}) for segment in row["segments"]])


@pytest.fixture
def flat_folder(object_folder: Path) -> Path:
    """The same dataset as SPLIT/images/NAME.png and SPLIT/masks/NAME/*.png."""
    split = object_folder / "train"
    for name in ("a", "b"):
        for part in ("images", "masks"):
            (split / part).mkdir(exist_ok=True)
        (split / name / "images" / f"{name}.png").rename(split / "images" / f"{name}.png")
        (split / name / "masks").rename(split / "masks" / name)
        (split / name / "images").rmdir()
        (split / name).rmdir()
    return object_folder


@pytest.mark.parametrize("shape", ["object_folder", "flat_folder"])
def test_every_mask_is_a_segment(
    shape: str, overlapping_masks: np.ndarray, cache_dir: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(shape)
    assert list_splits(root) == ["train"]
    data = load(root, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("object_masks", "instance", 2)
    assert (data.label_spec.id2label, data.label_spec.thing_label_ids) == ({0: "object"}, (0,))
    first, second = data.row(0), data.row(1)
    assert (first["image_id"], Path(first["file_name"]).name) == ("a", "a.png")
    assert [(s["id"], s["label_id"], s["iscrowd"], s["area"]) for s in first["segments"]] == [
        (1, 0, False, 16),
        (2, 0, False, 16),
    ]
    np.testing.assert_array_equal(masks_of(first), overlapping_masks[:2])
    np.testing.assert_array_equal(masks_of(second), overlapping_masks[2:])


def test_every_task_is_derived(object_folder: Path, cache_dir: str) -> None:
    assert load(object_folder, cache_dir=cache_dir).sample(0).masks.sum(axis=0).max() == 2
    semantic = load(object_folder, task="semantic", cache_dir=cache_dir)
    objects, background = semantic.sample(0).masks
    assert objects.sum() == 16 + 16 - 4
    np.testing.assert_array_equal(background, ~objects)
    np.testing.assert_array_equal(semantic.reference(0), np.where(objects, 0, 1))
    assert semantic.label_spec.id2label[1] == "background"
    with pytest.raises(ValueError, match="task 'panoptic' is not possible with format object_masks"):
        load(object_folder, task="panoptic", cache_dir=cache_dir)


def test_a_split_alone_and_the_name_of_the_class(object_folder: Path, flat_folder: Path, cache_dir: str) -> None:
    data = load(flat_folder / "train", split=None, class_name="nucleus", cache_dir=cache_dir)
    assert (len(data), data.label_spec.id2label) == (2, {0: "nucleus"})


def test_image_folders_without_a_split(object_folder: Path, cache_dir: str) -> None:
    root = object_folder / "train"
    assert list_splits(root) == []
    assert len(load(root, split=None, cache_dir=cache_dir)) == 2
    with pytest.raises(ValueError, match="no split 'train' and no other; its images lie at the top, so pass split="):
        load(root, cache_dir=cache_dir)


@pytest.mark.parametrize("shape", ["object_folder", "flat_folder"])
def test_class_folders_of_all_splits(shape: str, cache_dir: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(shape)
    shutil.copytree(root / "train", root / "val")
    names = {"train": ("dog", "cat"), "val": ("dog", "bird")}
    for split, (first, second) in names.items():
        for image in ("a", "b"):
            item = root / split / (f"{image}/masks" if shape == "object_folder" else f"masks/{image}")
            for file, name in zip(sorted(item.iterdir()), (first, second), strict=False):
                (item / name).mkdir()
                file.rename(item / name / file.name)
    assert list_splits(root) == ["train", "val"]
    data = load(root, cache_dir=cache_dir)
    assert data.label_spec.id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert [s["label_id"] for s in data.row(0)["segments"]] == [1, 2]  # cat/m1.png, dog/m0.png
    assert load(root, split="val", cache_dir=cache_dir).label_spec == data.label_spec


def test_another_split_that_is_broken_is_its_own_problem(object_folder: Path, read_rows: Callable) -> None:
    shutil.copytree(object_folder / "train", object_folder / "val")
    shutil.rmtree(object_folder / "val" / "b" / "masks")
    rows, problems = read_rows(object_folder, "raise")
    assert (len(rows), problems.found) == (2, [])


def test_one_image_in_a_split(flat_folder: Path, cache_dir: str) -> None:
    split = flat_folder / "train"
    (split / "images" / "b.png").unlink()
    shutil.rmtree(split / "masks" / "b")
    assert [layout.images for layout in find_layouts(flat_folder, "train")] == [split / "images"]
    assert len(load(flat_folder, cache_dir=cache_dir)) == 1


def write_mask(mask: np.ndarray, mode: str, file: Path) -> None:
    """The mask in one of the ways that people write it."""
    values = mask.astype(np.uint8)
    alpha = np.stack([values * 255] * 4, axis=-1)
    images = {
        "1": lambda: Image.fromarray(mask),
        "L of 1": lambda: Image.fromarray(values),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16) * 700),
        "P": lambda: Image.fromarray(values).convert("P"),
        "RGB": lambda: Image.fromarray(alpha[..., :3]),
        "RGBA": lambda: Image.fromarray(np.concatenate([alpha[..., :3], np.full_like(alpha[..., :1], 255)], axis=-1)),
        "white, alpha": lambda: Image.fromarray(
            np.concatenate([np.full_like(alpha[..., :3], 255), alpha[..., :1]], axis=-1)
        ),
        "LA": lambda: Image.fromarray(np.stack([values * 255, np.full_like(values, 255)], axis=-1), "LA"),
    }
    image = images[mode]()
    if mode == "P":
        image = Image.fromarray(values)
        image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(file)


@pytest.mark.parametrize("mode", ["1", "L of 1", "I;16", "P", "RGB", "RGBA", "white, alpha", "LA"])
def test_ways_to_write_a_mask(
    mode: str, object_folder: Path, overlapping_masks: np.ndarray, read_rows: Callable
) -> None:
    write_mask(overlapping_masks[0], mode, object_folder / MASK)
    rows, problems = read_rows(object_folder, "raise")
    assert not problems.found
    np.testing.assert_array_equal(masks_of(rows[0])[0], overlapping_masks[0])


def grey_levels(root: Path) -> None:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(root / MASK)


def second_image(root: Path) -> None:
    shutil.copy(root / IMAGE, root / "train" / "a" / "images" / "again.png")


def class_folder(root: Path) -> None:
    (root / "train" / "b" / "masks" / "cell").mkdir()
    (root / "train" / "b" / "masks" / "m0.png").rename(root / "train" / "b" / "masks" / "cell" / "m0.png")
    (root / "train" / "a" / "masks" / "m1.png").unlink()


BREAKS = {
    "grey levels": (
        grey_levels,
        "broken_mask",
        MASK,
        r"m0\.png: a mask may have one value .* has 1, 2, 3, 4, 5, \.",
        2,
    ),
    "other size": (
        lambda root: Image.new("L", (9, 6), 255).save(root / MASK),
        *("size_mismatch", MASK, r"m0\.png is 9x6 .*a\.png is 8x6", 2),
    ),
    "empty mask file": (lambda root: (root / MASK).write_bytes(b""), "unreadable_file", MASK, "cannot be read", 2),
    "CMYK": (
        lambda root: Image.new("CMYK", (8, 6)).save(root / MASK, format="TIFF"),
        *("broken_mask", MASK, "is of mode CMYK, allowed: 1, L", 2),
    ),
    "no class folder": (class_folder, "unknown_label", MASK, r"m0\.png: lies in no class folder, .* exist: cell", 2),
    "empty image": (lambda root: (root / IMAGE).write_bytes(b""), "unreadable_file", IMAGE, "cannot be read", 1),
    "no image": (
        lambda root: (root / IMAGE).unlink(),
        *("missing_file", "train/a/images", r"a/images holds no file that ends with .*; it is empty", 1),
    ),
    "no masks": (
        lambda root: shutil.rmtree(root / "train" / "a" / "masks"),
        *("missing_file", "train/a", r"a: must hold the folders images/ and masks/", 1),
    ),
    "two images": (second_image, "duplicate", "train/a", r"a/images holds 2 images, allowed is 1: a\.png, again", 1),
}


@pytest.mark.parametrize("name", list(BREAKS))
def test_what_is_broken_is_raised_or_listed(name: str, object_folder: Path, check_problem: Callable) -> None:
    damage, kind, file, message, rows_left = BREAKS[name]
    damage(object_folder)
    assert len(check_problem(object_folder, kind, file, message)) == rows_left


@pytest.mark.parametrize("suffix", [".PNG", ".bmp", ".tif", ".TIFF"])
def test_every_lossless_suffix_is_a_mask(
    suffix: str, object_folder: Path, overlapping_masks: np.ndarray, read_rows: Callable
) -> None:
    for file in (object_folder / "train" / "a" / "masks").iterdir():
        Image.open(file).save(file.with_suffix(suffix))
        file.unlink()
    rows, problems = read_rows(object_folder, "raise")
    np.testing.assert_array_equal(masks_of(rows[0]), overlapping_masks[:2])
    assert problems.found == []


@pytest.mark.parametrize("shape", ["object_folder", "flat_folder"])
def test_a_folder_without_any_mask_is_no_image_without_objects(
    shape: str, check_problem: Callable, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(shape)
    folder = "train/a/masks" if shape == "object_folder" else "train/masks/a"
    for file in (root / folder).iterdir():
        file.rename(file.with_suffix(".jpg"))
    message = r": none of its 2 file\(s\) is a mask, \[CLASS/\]NAME with one of \.png"
    rows = check_problem(root, "missing_file", folder, message)
    assert [row["image_id"] for row in rows] == ["b"]


def test_classes_do_not_depend_on_the_case_of_suffixes(object_folder: Path, cache_dir: str) -> None:
    shutil.copytree(object_folder / "train", object_folder / "val")
    for split, name, suffix in (("train", "dog", ".png"), ("val", "cat", ".PNG")):
        for file in sorted((object_folder / split).glob("*/masks/*")):
            (file.parent / name).mkdir(exist_ok=True)
            file.rename(file.parent / name / f"{file.stem}{suffix}")
    for split in ("train", "val"):
        assert load(object_folder, split=split, cache_dir=cache_dir).label_spec.id2label == {0: "cat", 1: "dog"}


def test_linked_class_folders_are_read(object_folder: Path, tmp_path: Path, read_rows: Callable) -> None:
    for image in ("a", "b"):
        masks = object_folder / "train" / image / "masks"
        masks.rename(tmp_path / f"masks_of_{image}")
        masks.mkdir()
        (masks / "cell").symlink_to(tmp_path / f"masks_of_{image}")
    rows, problems = read_rows(object_folder, "raise")
    assert ([len(row["segments"]) for row in rows], problems.found) == ([2, 1], [])


def test_loose_images_and_folders_of_images_are_reported(object_folder: Path, read_rows: Callable) -> None:
    shutil.copy(object_folder / IMAGE, object_folder / "train" / "loose.png")
    shutil.copytree(object_folder / "train" / "a" / "images", object_folder / "train" / "a" / "images" / "sub")
    _, problems = read_rows(object_folder, "raise")
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [
        ("unlisted_file", "loose.png"),
        ("unlisted_file", "sub"),
    ]


@pytest.mark.parametrize("shape", ["object_folder", "flat_folder"])
def test_a_relative_root(
    shape: str, read_rows: Callable, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(shape) / "train"
    whole, _ = read_rows(root, "raise", split=None)
    monkeypatch.chdir(root)
    rows, _ = read_rows(Path(), "raise", split=None)
    assert rows == whole
    assert rows[0]["file_name"].startswith("train/")


FLAT_BREAKS = {
    "no masks": (
        lambda split: shutil.rmtree(split / "masks" / "a"),
        *(
            "train/images/a.png",
            r"a\.png: has no folder of its name in .*masks \(an image without objects has an empty",
        ),
    ),
    "no image": (
        lambda split: (split / "images" / "a.png").unlink(),
        *("train/masks/a", r"masks/a: has no image in .*images"),
    ),
}


@pytest.mark.parametrize("name", list(FLAT_BREAKS))
def test_images_and_folders_without_partner(name: str, flat_folder: Path, check_problem: Callable) -> None:
    damage, file, message = FLAT_BREAKS[name]
    damage(flat_folder / "train")
    rows = check_problem(flat_folder, "missing_file", file, message)
    assert [row["image_id"] for row in rows] == ["b"]


@pytest.mark.parametrize(
    ("damage", "kind", "message", "segments"),
    [
        (lambda masks: Image.new("L", (8, 6)).save(masks / "m0.png"), "empty_mask", "has no pixel inside", [2]),
        (
            lambda masks: shutil.copy(masks / "m0.png", masks / "m1.png"),
            *("duplicate", "a.png: its masks: annotations m0.png and m1.png have one class", [1, 2]),
        ),
        (
            lambda masks: (masks / "notes.txt").write_text("x"),
            "unlisted_file",
            "does not end with one of .png",
            [1, 2],
        ),
        (
            lambda masks: shutil.copytree(masks, masks / "cell" / "deep"),
            *("unlisted_file", "deep: folders are not looked into here, its 2 file", [1, 2]),
        ),
    ],
)
def test_warnings(
    damage: Callable, kind: str, message: str, segments: list[int], object_folder: Path, read_rows: Callable
) -> None:
    damage(object_folder / "train" / "a" / "masks")
    rows, problems = read_rows(object_folder, "raise")
    assert [problem.kind for problem in problems.found] == [kind]
    assert message in problems.found[0].message
    assert [segment["id"] for segment in rows[0]["segments"]] == segments


def test_an_image_with_a_mask_that_cannot_be_read_is_left_out(object_folder: Path, cache_dir: str) -> None:
    (object_folder / MASK).write_bytes(b"not an image")
    data = load(object_folder, on_bad_sample="skip", cache_dir=cache_dir)
    assert [data.row(index)["image_id"] for index in range(len(data))] == ["b"]


def test_an_image_without_objects(flat_folder: Path, read_rows: Callable) -> None:
    (flat_folder / "train" / "masks" / "b" / "m0.png").unlink()
    rows, problems = read_rows(flat_folder, "raise")
    assert [len(row["segments"]) for row in rows] == [2, 0]
    assert not problems.found


@pytest.mark.parametrize("classes", [False, True])
def test_real_nuclei_keep_every_mask(classes: bool, shared_data: Path, tmp_path: Path, read_rows: Callable) -> None:
    """The instances of three real images, written as one PNG each, come back as the same codes."""
    rows, _ = read_rows(shared_data / "nuclei", "raise", split="val", format="coco_instance")
    rows = [row for row in rows if row["segments"]][:3]
    for row in rows:
        item = tmp_path / "set" / "val" / row["image_id"]
        (item / "images").mkdir(parents=True)
        shutil.copy(row["image"]["path"], item / "images" / f"{row['image_id']}.png")
        for number, segment in enumerate(row["segments"]):
            mask = decode_rle({"size": [row["height"], row["width"]], "counts": segment["rle"]})
            file = item / "masks" / ("nucleus" if classes else "") / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
    again, problems = read_rows(tmp_path / "set", "raise", split="val")
    assert not problems.found
    by_id = {row["image_id"]: [segment["rle"] for segment in row["segments"]] for row in again}
    assert by_id == {row["image_id"]: [segment["rle"] for segment in row["segments"]] for row in rows}
    assert sum(map(len, by_id.values())) > 10
