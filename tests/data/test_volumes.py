"""NIfTI volumes: axes and spacing, exact counts, and an error that names the file for every kind of damage."""

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf_maskformer.cli.inspect_dataset import draw_picture
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.volumes import VolumeItem, label_slice, read_volume, volumes_items, volumes_spec

nibabel = pytest.importorskip("nibabel")

SIZE = (4, 3, 2)  # x, y, z as stored
AFFINE = np.diag([0.5, 1.0, 3.0, 1.0])


def write(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One pair "a": 24 voxels, 5 of label 1 in the second slice, 1 void."""
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[:2, :2, 1], labels[3, 0, 1], labels[3, 2, 0] = 1, 1, 255
    write(tmp_path / "train" / "images" / "a.nii.gz", np.arange(24, dtype=np.int16).reshape(SIZE))
    write(tmp_path / "train" / "labels" / "a.nii.gz", labels)
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "background", "1": "liver"}))
    return tmp_path


def read(root: Path) -> tuple[list[VolumeItem], Problems]:
    problems, train = Problems("list"), root / "train"
    spec = volumes_spec(train / "labels", root, problems)
    return list(volumes_items(train / "images", train / "labels", spec, problems)), problems


def test_axes_spacing_and_counts(root: Path) -> None:
    (item,), problems = read(root)
    assert problems.found == []
    assert (item.size, item.spacing) == ((2, 3, 4), (3.0, 1.0, 0.5))
    assert (item.labels.tolist(), item.voxels.tolist(), item.void_voxels) == ([0, 1], [18, 5], 1)
    volume = read_volume(item.image)
    assert volume.values[1, 2, 3] == 3 * 6 + 2 * 2 + 1  # z, y, x of what is stored as x, y, z


def test_the_slice_shows_most_of_the_rare_label(root: Path) -> None:
    (item,), _ = read(root)
    grey, labels = label_slice(item)
    assert (grey.shape, grey.dtype, grey.min(), grey.max()) == ((3, 4), np.uint8, 0, 255)
    np.testing.assert_array_equal(labels, [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_a_volume_that_is_all_void_is_drawn(root: Path) -> None:
    write(root / "train" / "labels" / "a.nii.gz", np.full(SIZE, 255, dtype=np.uint8))
    report = inspect_dataset(root)
    (picture,) = report.pictures
    assert (picture.source.commonest, picture.source.void_voxels) == (None, 24)
    assert draw_picture(picture).size == (640, 480)


def test_a_fourth_axis_of_length_one_is_dropped(root: Path) -> None:
    path = write(root / "b.nii.gz", np.zeros((*SIZE, 1), dtype=np.uint8))
    assert read_volume(path).values.shape == (2, 3, 4)


def set_voxel(value: float, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(dtype)
        values[0, 0, 0] = value
        return values

    return change


@pytest.mark.parametrize(
    ("part", "change", "kind", "words"),
    [
        ("labels", lambda values: values[:3], "size_mismatch", r"\(2, 3, 3\).*\(2, 3, 4\)"),
        ("labels", set_voxel(6, np.uint8), "unknown_label", r"label 6 is not in id2label, allowed: 0\.\.1 or 255"),
        ("labels", set_voxel(0.25, np.float32), "unknown_label", r"whole numbers, found 0\.25"),
        ("labels", set_voxel(np.nan, np.float32), "unknown_label", "whole numbers, found nan"),
        ("labels", np.zeros_like, "empty_mask", "every voxel is 0"),
        ("images", set_voxel(np.inf, np.float32), "unreadable_file", "1 voxels are nan or infinite"),
        ("images", lambda values: np.stack([values] * 2, axis=-1), "size_mismatch", r"3 axes.*\(4, 3, 2, 2\)"),
    ],
)
def test_wrong_values_are_listed(root: Path, part: str, change: Callable, kind: str, words: str) -> None:
    path = root / "train" / part / "a.nii.gz"
    write(path, change(np.asanyarray(nibabel.load(path).dataobj)))
    _, problems = read(root)
    assert [(problem.kind, problem.file) for problem in problems.found] == [(kind, str(path))]
    assert re.search(words, problems.found[0].message)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: b"text", lambda content: content[:60]])
def test_files_that_cannot_be_read_are_listed(root: Path, damage: Callable) -> None:
    path = root / "train" / "images" / "a.nii.gz"
    path.write_bytes(damage(path.read_bytes()))
    items, problems = read(root)
    assert items == []
    assert [(problem.kind, problem.file) for problem in problems.found] == [("unreadable_file", str(path))]
    with pytest.raises(DatasetError, match=r"a\.nii\.gz: cannot be read as NIfTI"):
        read_volume(path)


@pytest.mark.parametrize(("offset", "value"), [(70, 4096), (70, 128), (42, 0)])
def test_damaged_headers_are_listed(root: Path, offset: int, value: int) -> None:
    path = root / "train" / "labels" / "a.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[offset : offset + 2] = value.to_bytes(2, "little")  # the type of the voxels, a length
    path.write_bytes(gzip.compress(bytes(content)))
    items, problems = read(root)
    assert items == []
    assert [problem.file for problem in problems.found] == [str(path)]
    assert problems.found[0].kind in ("unreadable_file", "size_mismatch")


def test_another_spacing_is_listed(root: Path) -> None:
    path = root / "train" / "labels" / "a.nii.gz"
    write(path, np.asanyarray(nibabel.load(path).dataobj), affine=np.diag([0.5, 1.0, 3.5, 1.0]))
    items, problems = read(root)
    assert (items, problems.found[0].kind) == ([], "size_mismatch")
    assert "spacing (3.5, 1.0, 0.5) and (3.0, 1.0, 0.5) mm" in problems.found[0].message


def test_partners_twins_and_other_files_are_listed(root: Path) -> None:
    train = root / "train"
    alone = write(train / "images" / "b.nii.gz", np.zeros(SIZE, dtype=np.uint8))
    lonely = write(train / "labels" / "c.nii", np.zeros(SIZE, dtype=np.uint8))
    write(train / "images" / "a.nii", np.zeros(SIZE, dtype=np.uint8))
    (train / "images" / "readme.md").write_text("x")
    items, problems = read(root)
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("duplicate", str(train / "images" / "a.nii.gz")),
        ("unlisted_file", str(train / "images" / "readme.md")),
        ("missing_file", str(alone)),
        ("missing_file", str(lonely)),
    ]
    assert [item.image.name for item in items] == ["a.nii"]


def test_labels_are_inferred_without_names(root: Path) -> None:
    (root / "id2label.json").unlink()
    problems = Problems("list")
    spec = volumes_spec(root / "train" / "labels", root, problems)
    assert spec.id2label == {0: "label_0", 1: "label_1"}
    assert [problem.kind for problem in problems.found] == ["missing_file"]


def test_without_nibabel_the_message_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ValueError, match=r"pip install hf_maskformer\[volumes\]"):
        read_volume(root / "train" / "images" / "a.nii.gz")
