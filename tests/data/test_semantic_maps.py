"""Semantic map folders: exact rows, and an error that names the file for every kind of damage."""

import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.load import load
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.sample import FEATURES
from hf_maskformer.data.semantic_maps import read_label_map, semantic_maps_source
from hf_maskformer.model.label_spec import LabelSpec


def label_file(root: Path, number: int = 0) -> Path:
    return root / "train" / "labels" / f"{number}.png"


def test_rows_samples_and_references(semantic_folder: Path, cache_dir: str) -> None:
    data = load(semantic_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("semantic_maps", "semantic", 2)
    assert data.dataset.features == FEATURES
    assert data.label_spec.id2label == {0: "road", 1: "tree", 2: "sky"}
    row = data.row(0)
    assert (row["image_id"], row["file_name"], row["height"], row["width"]) == ("0", "train/images/0.png", 6, 8)
    assert [(s["id"], s["label_id"], s["area"], s["bbox"]) for s in row["segments"]] == [
        (1, 0, 23.0, [0, 0, 4, 6]),
        (2, 1, 24.0, [4, 0, 4, 6]),
    ]
    expected = np.asarray(Image.open(label_file(semantic_folder)))
    np.testing.assert_array_equal(data.reference(0), expected)
    assert data.reference(0).dtype == np.int64
    sample = data.sample(0)
    assert sample.class_labels.tolist() == [0, 1]
    np.testing.assert_array_equal(sample.masks, [expected == 0, expected == 1])


def test_a_changed_label_file_is_read_again(semantic_folder: Path, cache_dir: str) -> None:
    before = load(semantic_folder, cache_dir=cache_dir)
    assert [s["label_id"] for s in before.row(1)["segments"]] == [2]
    path = label_file(semantic_folder, 1)
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    Image.fromarray(np.full((6, 8), 1, dtype=np.uint8)).save(path)
    assert path.stat().st_size == size, "the case of interest: only the time tells"
    os.utime(path, ns=(time + 1, time + 1))
    after = load(semantic_folder, cache_dir=cache_dir)
    assert [s["label_id"] for s in after.row(1)["segments"]] == [1]


def test_unchanged_files_are_not_read_again(
    semantic_folder: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(semantic_folder, cache_dir=cache_dir)

    def fail(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} is read a second time")

    monkeypatch.setattr("hf_maskformer.data.semantic_maps.read_label_map", fail)
    assert load(semantic_folder, cache_dir=cache_dir).row(0) == first.row(0)


def test_ignore_index_is_part_of_the_cache(semantic_folder: Path, cache_dir: str) -> None:
    load(semantic_folder, cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r"0\.png: label 255 is not in id2label, allowed: 0\.\.2"):
        load(semantic_folder, cache_dir=cache_dir, ignore_index=254)


def test_unknown_label_names_file_value_and_allowed(semantic_folder: Path, cache_dir: str) -> None:
    labels = np.asarray(Image.open(label_file(semantic_folder))).copy()
    labels[3, 3] = 17
    Image.fromarray(labels).save(label_file(semantic_folder))
    for _ in range(2):  # nothing of the failed attempt may be stored
        with pytest.raises(ValueError, match=r"labels/0\.png: label 17 is not in id2label, allowed: 0\.\.2"):
            load(semantic_folder, cache_dir=cache_dir)


def test_one_based_labels_are_recognised(semantic_folder: Path, cache_dir: str) -> None:
    Image.fromarray(np.array([[1, 2, 3, 3]] * 4, dtype=np.uint8)).save(label_file(semantic_folder))
    Image.new("RGB", (4, 4)).save(semantic_folder / "train" / "images" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: label 3 .*1-based"):
        load(semantic_folder, cache_dir=cache_dir)


def test_size_mismatch_names_both_files_and_sizes(semantic_folder: Path, cache_dir: str) -> None:
    Image.new("RGB", (5, 4)).save(semantic_folder / "train" / "images" / "1.png")
    with pytest.raises(ValueError, match=r"images/1\.png is 5x4 .*labels/1\.png is 8x6"):
        load(semantic_folder, cache_dir=cache_dir)


def test_image_changed_after_indexing_is_noticed(semantic_folder: Path, cache_dir: str) -> None:
    data = load(semantic_folder, cache_dir=cache_dir)
    Image.new("RGB", (5, 4)).save(semantic_folder / "train" / "images" / "1.png")
    with pytest.raises(ValueError, match=r"images/1\.png is 5x4 .* it was 8x6 when the dataset was indexed"):
        data.sample(1)


@pytest.mark.parametrize(("part", "other"), [("images", "labels"), ("labels", "images")])
def test_files_without_partner_are_named(semantic_folder: Path, cache_dir: str, part: str, other: str) -> None:
    (semantic_folder / "train" / part / "1.png").rename(semantic_folder / "train" / part / "lonely.png")
    with pytest.raises(
        ValueError, match=r"images/\w+\.png: has no partner of the same name in .*labels \(1 image file\(s\)"
    ):
        load(semantic_folder, cache_dir=cache_dir)
    (semantic_folder / "train" / part / "lonely.png").unlink()
    with pytest.raises(ValueError, match=rf"{other}/1\.png: has no partner of the same name in .*{part} "):
        load(semantic_folder, cache_dir=cache_dir)
    assert (semantic_folder / "train" / other / "1.png").exists()


def test_empty_folder_and_wrong_kind_of_files(semantic_folder: Path, cache_dir: str) -> None:
    images = semantic_folder / "train" / "images"
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"images holds no file that ends with \.jpg.*it is empty"):
        load(semantic_folder, cache_dir=cache_dir)
    (images / "scan.nii.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"found 1 other file\(s\) such as scan\.nii\.gz"):
        load(semantic_folder, cache_dir=cache_dir)


def test_two_images_of_one_name(semantic_folder: Path, cache_dir: str) -> None:
    Image.new("RGB", (8, 6)).save(semantic_folder / "train" / "images" / "0.jpg")
    with pytest.raises(ValueError, match=r"0\.jpg and 0\.png: one name, two files"):
        load(semantic_folder, cache_dir=cache_dir)


def test_labels_without_a_names_file_are_inferred_over_all_splits(
    semantic_folder: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    (semantic_folder / "id2label.json").unlink()
    with caplog.at_level(logging.WARNING):
        data = load(semantic_folder, split="val", cache_dir=cache_dir)
    assert data.label_spec.id2label == {0: "label_0", 1: "label_1", 2: "label_2"}, "label 2 is only in train"
    assert "has no id2label.json" in caplog.text


def test_inferred_labels_must_have_no_gap(semantic_folder: Path, cache_dir: str) -> None:
    (semantic_folder / "id2label.json").unlink()
    Image.fromarray(np.full((6, 8), 3, dtype=np.uint8)).save(label_file(semantic_folder, 1))
    with pytest.raises(ValueError, match=r"labels found, \[0, 1, 3\], are not 0\.\.K-1 without a gap"):
        load(semantic_folder, cache_dir=cache_dir)


@pytest.mark.parametrize("text", ["[1, 2]", '{"road": 0}', "{"])
def test_broken_names_file_is_named(semantic_folder: Path, cache_dir: str, text: str) -> None:
    (semantic_folder / "id2label.json").write_text(text)
    with pytest.raises(ValueError, match=r"id2label\.json: "):
        load(semantic_folder, cache_dir=cache_dir)


def test_names_with_a_gap_are_refused(semantic_folder: Path, cache_dir: str) -> None:
    (semantic_folder / "id2label.json").write_text(json.dumps({"0": "a", "2": "b"}))
    with pytest.raises(ValueError, match=r"id2label\.json: id2label must name the ids 0\.\.K-1"):
        load(semantic_folder, cache_dir=cache_dir)


@pytest.mark.parametrize("names", ["label_table.json", "id2label.json", "option", None])
def test_ignore_index_0(semantic_folder: Path, cache_dir: str, names: str | None) -> None:
    """As in many sets: 0 is void and the classes are 1..K."""
    options: dict = {"ignore_index": 0}
    table = {"1": "label_1", "2": "label_2"}
    (semantic_folder / "id2label.json").unlink()
    if names == "option":
        options["label_table"] = table
    elif names is not None:
        (semantic_folder / names).write_text(json.dumps(table))
    for path in semantic_folder.glob("*/labels/0.png"):
        values = np.asarray(Image.open(path)).copy()
        values[0, 0] = 0
        Image.fromarray(values).save(path)
    data = load(semantic_folder, cache_dir=cache_dir, **options)
    assert data.label_spec.id2label == {0: "label_1", 1: "label_2"}
    expected = np.full((6, 8), data.label_spec.ignore_index)
    expected[:, 4:] = 0
    np.testing.assert_array_equal(data.reference(0), expected)
    assert [segment["label_id"] for segment in data.row(1)["segments"]] == [1]


def test_a_named_value_cannot_be_void(semantic_folder: Path, cache_dir: str) -> None:
    with pytest.raises(ValueError, match=r"id2label\.json: ignore_index 0 is also the label 'road'"):
        load(semantic_folder, cache_dir=cache_dir, ignore_index=0)
    with pytest.raises(ValueError, match="ignore_index must be a whole number of at least 0, got '255'"):
        load(semantic_folder, cache_dir=cache_dir, ignore_index="255")


def test_names_files_of_windows_and_names_that_are_no_text(semantic_folder: Path, cache_dir: str) -> None:
    names = semantic_folder / "id2label.json"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes())
    assert load(semantic_folder, cache_dir=cache_dir).label_spec.id2label[0] == "road"
    names.write_text('{"0": null, "1": "a", "2": "b"}')
    with pytest.raises(ValueError, match=r"id2label\.json: label 0 has the name None, which is no text"):
        load(semantic_folder, cache_dir=cache_dir)


def make_binary(root: Path) -> None:
    for path in root.glob("*/labels/*.png"):
        values = np.zeros((6, 8), dtype=np.uint8)
        values[:, 4:] = 255
        Image.fromarray(values).save(path)


@pytest.mark.parametrize("named", [True, False])
def test_black_and_white_masks_need_a_word_about_255(
    semantic_folder: Path, cache_dir: str, read_rows: Callable, named: bool
) -> None:
    make_binary(semantic_folder)
    names = {"0": "background", "1": "object"}
    (semantic_folder / "id2label.json").write_text(json.dumps(names))
    if not named:
        (semantic_folder / "id2label.json").unlink()
    stated = load(semantic_folder, cache_dir=cache_dir, ignore_index=255)
    assert np.unique(stated.reference(0)).tolist() == [0, 255]
    words = (
        r'train/labels/0\.png: maps hold only 0 and 255, of which 255 is void by default.*"255": "object"\}.*'
        "pass ignore_index=255"
    )
    with pytest.raises(ValueError, match=words):  # although the rows are stored for a stated ignore_index
        load(semantic_folder, cache_dir=cache_dir)
    _, problems = read_rows(semantic_folder, "list")
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unknown_label", str(label_file(semantic_folder)))
    ]
    (semantic_folder / "label_table.json").write_text('{"0": "background", "255": "object"}')
    data = load(semantic_folder, cache_dir=cache_dir)
    assert data.label_spec.id2label == {0: "background", 1: "object"}
    assert [segment["area"] for segment in data.row(0)["segments"]] == [24, 24]


def test_one_class_and_other_labels_beside_0_and_255_are_no_error(semantic_folder: Path, cache_dir: str) -> None:
    make_binary(semantic_folder)
    (semantic_folder / "id2label.json").write_text('{"0": "cell"}')
    assert load(semantic_folder, cache_dir=cache_dir).label_spec.num_labels == 1
    (semantic_folder / "id2label.json").unlink()
    Image.fromarray(np.ones((6, 8), dtype=np.uint8)).save(semantic_folder / "val" / "labels" / "0.png")
    assert load(semantic_folder, cache_dir=cache_dir).label_spec.num_labels == 2
    (semantic_folder / "id2label.json").write_text('{"0": "background", "1": "object"}')
    assert load(semantic_folder, cache_dir=cache_dir).label_spec.num_labels == 2
    (semantic_folder / "id2label.json").unlink()
    for path in semantic_folder.glob("*/labels/*.png"):
        Image.new("L", (8, 6)).save(path)
    assert load(semantic_folder, split="val", cache_dir=cache_dir).label_spec.id2label == {0: "label_0"}


def test_values_of_deep_maps_without_names_may_be_objects(
    semantic_folder: Path, cache_dir: str, read_rows: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    deep = np.asarray(Image.open(label_file(semantic_folder))).astype(np.uint16)
    Image.fromarray(deep).save(label_file(semantic_folder))
    assert read_rows(semantic_folder, "list")[1].found == []
    (semantic_folder / "id2label.json").unlink()
    for _ in range(2):  # read, and from what is stored
        caplog.clear()
        assert load(semantic_folder, cache_dir=cache_dir).label_spec.num_labels == 3
        assert caplog.text.count("train/labels/0.png: a map of more than 8 bits whose values have no names") == 1
        assert "read them with format='instance_maps' (--format instance_maps); if they are classes" in caplog.text
    _, problems = read_rows(semantic_folder, "list")
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unknown_label", str(label_file(semantic_folder)))
    ]


VALUES = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)


def test_label_map_of_palette_gives_the_index(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata(VALUES.reshape(-1).tolist())
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "p.png"), VALUES)


def test_label_map_of_one_bit(tmp_path: Path) -> None:
    Image.fromarray(VALUES > 1).save(tmp_path / "b.png")
    labels = read_label_map(tmp_path / "b.png")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, VALUES > 1)


def test_label_map_of_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(VALUES.astype(np.uint16) * 300).save(tmp_path / "w.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "w.png"), VALUES.astype(int) * 300)


@pytest.mark.parametrize("bits", [2, 4])
def test_label_map_of_few_grey_bits_is_not_stretched(tmp_path: Path, bits: int) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = b""
    for line in VALUES:
        packed = 0
        for value in line:
            packed = packed << bits | int(value)
        lines += b"\0" + packed.to_bytes(4 * bits // 8, "big")
    header = struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "g.png").write_bytes(png)
    np.testing.assert_array_equal(read_label_map(tmp_path / "g.png"), VALUES)


def test_colour_label_map_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: label map of mode RGB \(3 channels\)"):
        read_label_map(tmp_path / "c.png")


def test_camvid(shared_data: Path, shared_cache: str) -> None:
    data = load(shared_data / "camvid", split="val", cache_dir=shared_cache)
    assert len(data) == 101
    assert data.label_spec.num_labels == 11
    for index in (0, 50, 100):
        path = shared_data / "camvid" / "val" / "labels" / f"{data.row(index)['image_id']}.png"
        np.testing.assert_array_equal(data.reference(index), np.asarray(Image.open(path)))
        assert data.sample(index).image.shape == (360, 480, 3)


def test_every_problem_is_listed(semantic_folder: Path, read_rows: Callable) -> None:
    train = semantic_folder / "train"
    for number in range(2, 8):
        shutil.copy(train / "images" / "1.png", train / "images" / f"{number}.png")
        shutil.copy(train / "labels" / "1.png", train / "labels" / f"{number}.png")
    labels = np.asarray(Image.open(train / "labels" / "2.png")).copy()
    labels[0, :3] = 9
    Image.fromarray(labels).save(train / "labels" / "2.png")
    (train / "labels" / "3.png").write_bytes(b"")
    (train / "images" / "4.png").write_text("no image")
    Image.new("RGB", (5, 4)).save(train / "images" / "5.png")
    (train / "labels" / "6.png").unlink()
    (train / "images" / "7.png").unlink()
    Image.new("RGB", (8, 6)).save(train / "images" / "0.jpg")
    (train / "images" / "notes.txt").write_text("x")
    rows, problems = read_rows(semantic_folder, "list")
    found = [(problem.kind, str(Path(problem.file).relative_to(train))) for problem in problems.found]
    assert found == [
        ("duplicate", "images/0.png"),
        ("missing_file", "images/6.png"),
        ("unlisted_file", "images/notes.txt"),
        ("missing_file", "labels/7.png"),
        ("unknown_label", "labels/2.png"),
        ("unreadable_file", "labels/3.png"),
        ("unreadable_file", "images/4.png"),
        ("size_mismatch", "images/5.png"),
    ]
    assert [row["image_id"] for row in rows] == ["0", "1", "2"]
    assert [segment["area"] for segment in rows[2]["segments"]] == [45], "the pixels of the unknown label are void"


def test_labels_with_gaps_are_listed_and_kept(semantic_folder: Path, read_rows: Callable) -> None:
    (semantic_folder / "id2label.json").unlink()
    Image.fromarray(np.full((6, 8), 30, dtype=np.uint8)).save(label_file(semantic_folder, 1))
    rows, problems = read_rows(semantic_folder, "list")
    assert [(problem.kind, problem.file) for problem in problems.found] == [("unknown_label", str(semantic_folder))]
    assert "[0, 1, 30]" in problems.found[0].message
    assert [[segment["label_id"] for segment in row["segments"]] for row in rows] == [[0, 1], [2]]


def test_inferred_labels_are_read_once(semantic_folder: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (semantic_folder / "id2label.json").unlink()

    def open_source() -> LabelSpec:
        return semantic_maps_source(
            semantic_folder / "train", semantic_folder, Problems(), cache_dir=cache_dir
        ).label_spec

    first = open_source()
    assert first.num_labels == 3
    monkeypatch.setattr("hf_maskformer.data.semantic_maps.read_label_map", None)
    assert open_source() == first
    Image.fromarray(np.full((6, 8), 1, dtype=np.uint8)).save(label_file(semantic_folder, 1))
    with pytest.raises(TypeError):
        open_source()


def test_other_folders_for_images_and_labels(semantic_folder: Path, read_rows: Callable) -> None:
    """images/SPLIT with labels/SPLIT."""
    for part in ("images", "labels"):
        (semantic_folder / part).mkdir()
        (semantic_folder / "train" / part).rename(semantic_folder / part / "train")
    images, labels = semantic_folder / "images" / "train", semantic_folder / "labels" / "train"
    source = semantic_maps_source(semantic_folder, semantic_folder, Problems(), images=images, labels=labels)
    assert [row["file_name"] for row in source.rows()] == ["images/train/0.png", "images/train/1.png"]


@pytest.mark.parametrize("suffix", [".bmp", ".tif"])
def test_label_files_of_other_kinds(semantic_folder: Path, cache_dir: str, suffix: str) -> None:
    expected = load(semantic_folder, cache_dir=cache_dir).reference(0)
    path = label_file(semantic_folder)
    Image.open(path).save(path.with_suffix(suffix))
    path.unlink()
    np.testing.assert_array_equal(load(semantic_folder, cache_dir=cache_dir).reference(0), expected)
