"""COCO panoptic files: ids, void and crowds; damage is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metric_cases import digest
from hf_maskformer.data.load import load
from hf_maskformer.data.problems import DatasetError


def annotations_file(root: Path) -> Path:
    return root / "train" / "panoptic.json"


def test_rows_and_reference(panoptic_folder: Path, cache_dir: str, panoptic_ids: np.ndarray) -> None:
    data = load(panoptic_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("coco_panoptic", "panoptic", 1)
    assert data.label_spec.id2label == {0: "cow", 1: "grass"}
    assert data.label_spec.thing_label_ids == (0,)
    reference = data.reference(0)
    np.testing.assert_array_equal(reference["segmentation"], panoptic_ids)
    assert reference["segmentation"].dtype == np.int32
    assert reference["segments_info"] == [
        {"id": 1000, "label_id": 0, "iscrowd": False, "area": 4.0},
        {"id": 70000, "label_id": 0, "iscrowd": True, "area": 4.0},
        {"id": 5, "label_id": 1, "iscrowd": False, "area": 48 - 8 - 1 - 12.0},
        {"id": 6, "label_id": 1, "iscrowd": False, "area": 12.0},
    ]


def test_training_targets_merge_stuff_and_leave_out_crowds(
    panoptic_folder: Path, cache_dir: str, panoptic_ids: np.ndarray
) -> None:
    sample = load(panoptic_folder, cache_dir=cache_dir).sample(0)
    assert sample.class_labels.tolist() == [0, 1]
    np.testing.assert_array_equal(sample.masks, [panoptic_ids == 1000, np.isin(panoptic_ids, [5, 6])])


def test_the_same_rows_serve_the_other_tasks(panoptic_folder: Path, cache_dir: str, panoptic_ids: np.ndarray) -> None:
    semantic = load(panoptic_folder, task="semantic", cache_dir=cache_dir).reference(0)
    expected = np.select([np.isin(panoptic_ids, [1000, 70000]), panoptic_ids == 0], [0, 255], 1)
    np.testing.assert_array_equal(semantic, expected)
    instance = load(panoptic_folder, task="instance", cache_dir=cache_dir).reference(0)
    assert instance["labels"].tolist() == [0, 0]
    assert instance["iscrowd"].tolist() == [False, True]


def segment(content: dict, index: int) -> dict:
    return content["annotations"][0]["segments_info"][index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: segment(c, 0).update(id=77), r"segment 77 of a\.png is in segments_info, but the PNG has no pixel"),
        (lambda c: segment(c, 0).update(id=0), r"segment 0 of a\.png is in segments_info, but id 0 is void"),
        (lambda c: segment(c, 0).update(id=5), r"segment 5 of a\.png stands twice"),
        (lambda c: segment(c, 2).update(category_id=3), r"segment 5 of a\.png has category_id 3.*allowed: 1, 2"),
        (lambda c: c["categories"][0].pop("isthing"), r"category 2 \(grass\) has no isthing"),
        (lambda c: c["annotations"].append(c["annotations"][0]), r"image 1 has more than one annotation"),
        (lambda c: c["annotations"][0].update(image_id=3), r"annotation \d of the list \(.*\) has image_id 3, which"),
        (lambda c: c.update(annotations=[]), r"1 image\(s\) have no annotation, such as a\.png"),
    ],
)
def test_damage_is_named(
    panoptic_folder: Path, cache_dir: str, edit_json: Callable, change: Callable, message: str
) -> None:
    edit_json(annotations_file(panoptic_folder), change)
    with pytest.raises(ValueError, match=r"panoptic\.json") as raised:
        load(panoptic_folder, cache_dir=cache_dir)
    assert raised.match(message)


def test_png_of_wrong_size_mode_or_missing(panoptic_folder: Path, cache_dir: str) -> None:
    png = panoptic_folder / "train" / "panoptic" / "a.png"
    Image.new("RGB", (4, 6)).save(png)
    with pytest.raises(ValueError, match=r"panoptic/a\.png is 4x6 .*images/a\.png is 8x6"):
        load(panoptic_folder, cache_dir=cache_dir)
    Image.new("L", (8, 6)).save(png)
    with pytest.raises(ValueError, match=r"a\.png: a panoptic PNG must be RGB .* mode L"):
        load(panoptic_folder, cache_dir=cache_dir)
    png.unlink()
    with pytest.raises(ValueError, match=r"panoptic/a\.png: no such panoptic PNG"):
        load(panoptic_folder, cache_dir=cache_dir)


def test_a_changed_png_is_read_again(panoptic_folder: Path, cache_dir: str, panoptic_ids: np.ndarray) -> None:
    load(panoptic_folder, cache_dir=cache_dir)
    png = panoptic_folder / "train" / "panoptic" / "a.png"
    colours = np.asarray(Image.open(png)).copy()
    colours[5, 0] = colours[5, 1]
    Image.fromarray(colours).save(png)
    reference = load(panoptic_folder, cache_dir=cache_dir).reference(0)
    np.testing.assert_array_equal(reference["segmentation"], np.where(panoptic_ids == 0, 5, panoptic_ids))


def plain_ids(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64) @ [1, 256, 65536]


def test_nuclei_agree_with_their_files(shared_data: Path, shared_cache: str) -> None:
    folder = shared_data / "nuclei" / "val"
    data = load(shared_data / "nuclei", split="val", cache_dir=shared_cache)
    assert (data.format, len(data)) == ("coco_panoptic", 66)
    content = json.loads((folder / "panoptic.json").read_text())
    for index in (0, 30, 65):
        annotation = content["annotations"][index]
        reference = data.reference(index)
        np.testing.assert_array_equal(
            reference["segmentation"], plain_ids(folder / "panoptic" / annotation["file_name"])
        )
        assert [s["area"] for s in reference["segments_info"]] == [s["area"] for s in annotation["segments_info"]]


def test_standard_coco_tree(shared_data: Path, shared_cache: str) -> None:
    root = shared_data / "coco_panoptic_sample"
    data = load(root, split=None, cache_dir=shared_cache)
    assert (len(data), data.label_spec.num_labels, len(data.label_spec.thing_label_ids)) == (2, 133, 80)
    assert data.label_spec.id2label[0] == "person"
    annotations = json.loads((root / "panoptic_examples.json").read_text())["annotations"]
    for index, annotation in enumerate(annotations):
        named = [segment["id"] for segment in annotation["segments_info"]]
        ids = plain_ids(root / "panoptic_examples" / annotation["file_name"])
        np.testing.assert_array_equal(data.reference(index)["segmentation"], np.where(np.isin(ids, named), ids, 0))
        assert len(data.sample(index).class_labels) > 3


def test_ids_and_areas_are_those_that_panopticapi_reads(shared_data: Path, shared_cache: str) -> None:
    """Recorded by record_panoptic_reader.py; equal hashes mean equal id maps."""
    recorded = json.loads((Path(__file__).parent / "fixtures" / "panoptic_reader.json").read_text())["images"]
    data = load(shared_data / "coco_panoptic_sample", split=None, cache_dir=shared_cache)
    assert len(data) == len(recorded) == 2
    for index in range(2):
        theirs, ours = recorded[Path(data.row(index)["file_name"]).with_suffix(".png").name], data.reference(index)
        assert {str(info["id"]): info["area"] for info in ours["segments_info"]} == theirs["areas"]
        assert (digest(ours["segmentation"]), (ours["segmentation"] == 0).sum()) == (theirs["id_map"], theirs["void"])


@pytest.mark.parametrize("name", [7, "", "a\0.png", "\ud800.png"])
def test_names_that_no_png_can_have(name: object, panoptic_folder: Path, edit_json: Callable) -> None:
    edit_json(annotations_file(panoptic_folder), lambda c: c["annotations"][0].update(file_name=name))
    with pytest.raises(DatasetError, match=r"the annotation of image 1 \(a\.png\) has file_name "):
        load(panoptic_folder, cache_dir=str(panoptic_folder / "cache"))


ALL_IDS = [[1000, 70000, 5, 6]]
# (change, kind, whether the PNG is the file to open, words of the message, segment ids of the rows that are left)
ERRORS: dict[str, tuple[Callable[[dict], object], str, bool, str, list]] = {
    "id without pixels": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 77, "category_id": 1}),
        "empty_mask",
        False,
        "segment 77 of a.png",
        ALL_IDS,
    ),
    "pixels without id": (
        lambda c: c["annotations"][0]["segments_info"].pop(0),
        "unlisted_segment",
        True,
        r"a\.png: has pixels of the ids 1000 \(4 pixels\)",
        [[70000, 5, 6]],
    ),
    "id 0": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 0, "category_id": 1}),
        "broken_record",
        False,
        "segment 0 of a.png",
        ALL_IDS,
    ),
    "repeated id": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 5, "category_id": 1}),
        "duplicate",
        False,
        "segment 5 of a.png stands twice",
        ALL_IDS,
    ),
    "no id": (
        lambda c: c["annotations"][0]["segments_info"].append({"category_id": 1}),
        "broken_record",
        False,
        "segment 4 of a.png has no id",
        ALL_IDS,
    ),
    "unknown category": (
        lambda c: segment(c, 2).update(category_id=3),
        "unknown_label",
        False,
        "segment 5 of a.png has category_id 3",
        [[1000, 70000, 6]],
    ),
    "crowd is a text": (
        lambda c: segment(c, 2).update(iscrowd="no"),
        "broken_record",
        False,
        "segment 5 of a.png has iscrowd 'no'",
        [[1000, 70000, 6]],
    ),
    "segment is a number": (
        lambda c: c["annotations"][0]["segments_info"].append(5),
        "broken_record",
        False,
        "segment 4 of a.png is no object",
        ALL_IDS,
    ),
    "no isthing": (
        lambda c: c["categories"][0].pop("isthing"),
        "broken_record",
        False,
        r"category 2 \(grass\) has no isthing",
        ALL_IDS,
    ),
    "unknown image": (
        lambda c: c["annotations"].append({**c["annotations"][0], "image_id": 9}),
        "broken_record",
        False,
        "image_id 9",
        ALL_IDS,
    ),
    "two annotations": (
        lambda c: c["annotations"].append(c["annotations"][0]),
        "duplicate",
        False,
        "image 1 has more than one annotation",
        ALL_IDS,
    ),
    "no segments_info": (
        lambda c: c["annotations"][0].pop("segments_info"),
        "broken_record",
        False,
        r"image 1 \(a\.png\) has no list segments_info",
        [],
    ),
    "no PNG name": (
        lambda c: c["annotations"][0].pop("file_name"),
        "broken_record",
        False,
        r"image 1 \(a\.png\) has no file_name",
        [],
    ),
    "no annotation": (
        lambda c: c.update(annotations=[]),
        "broken_record",
        False,
        "1 image.s. have no annotation, such as a.png",
        [],
    ),
    "annotation is a text": (
        lambda c: c["annotations"].append("x"),
        "broken_record",
        False,
        "annotation 1 of the list",
        ALL_IDS,
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_raised_or_listed(
    name: str, panoptic_folder: Path, edit_json: Callable, read_rows: Callable
) -> None:
    change, kind, is_png, words, left = ERRORS[name]
    edit_json(annotations_file(panoptic_folder), change)
    with pytest.raises(DatasetError, match=words) as raised:
        read_rows(panoptic_folder, "raise")
    expected = (kind, str(panoptic_folder / "train" / ("panoptic/a.png" if is_png else "panoptic.json")))
    assert (raised.value.problem.kind, raised.value.problem.file) == expected
    rows, problems = read_rows(panoptic_folder, "list")
    found = [problem for problem in problems.found if problem.kind != "unlisted_file"]
    assert [(problem.kind, problem.file) for problem in found] == [expected]
    assert [[entry["id"] for entry in row["segments"]] for row in rows] == left


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda png: png.write_bytes(b""), "unreadable_file"),
        (lambda png: png.write_text("no image"), "unreadable_file"),
        (lambda png: png.write_bytes(png.read_bytes()[:40]), "unreadable_file"),
        (lambda png: Image.new("L", (8, 6)).save(png), "unreadable_file"),
        (lambda png: Image.new("RGB", (7, 6)).save(png), "size_mismatch"),
        (lambda png: png.unlink(), "missing_file"),
    ],
)
def test_broken_pngs_are_listed(damage: Callable, kind: str, panoptic_folder: Path, read_rows: Callable) -> None:
    png = panoptic_folder / "train" / "panoptic" / "a.png"
    damage(png)
    rows, problems = read_rows(panoptic_folder, "list")
    assert rows == []
    assert [(problem.kind, problem.file) for problem in problems.found] == [(kind, str(png))]


def test_warnings_stop_nothing(panoptic_folder: Path, edit_json: Callable, read_rows: Callable) -> None:
    edit_json(annotations_file(panoptic_folder), lambda c: segment(c, 0).update(bbox=[0, 0, 4, 2]))
    edit_json(annotations_file(panoptic_folder), lambda c: segment(c, 1).update(bbox=[3, 3, 3, 2]))  # 1 pixel too wide
    for part in ("images", "panoptic"):
        Image.new("RGB", (8, 6)).save(panoptic_folder / "train" / part / "extra.png")
    rows, problems = read_rows(panoptic_folder, "raise")
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [
        ("unlisted_file", "extra.png"),
        ("unlisted_file", "extra.png"),
        ("box_mismatch", "panoptic.json"),
    ]
    assert "segment 1000 of a.png has bbox [0.0, 0.0, 4.0, 2.0], but its mask has [0.0, 0.0, 2.0, 2.0]" in (
        problems.found[-1].message
    )
    assert [entry["id"] for entry in rows[0]["segments"]] == ALL_IDS[0]


def test_correct_annotations_raise_no_alarm(shared_data: Path, read_rows: Callable) -> None:
    _, problems = read_rows(shared_data / "coco_panoptic_sample", "list", split=None)
    assert problems.found == []
    _, problems = read_rows(shared_data / "nuclei", "list", split="val", format="coco_panoptic")
    assert problems.found == []
