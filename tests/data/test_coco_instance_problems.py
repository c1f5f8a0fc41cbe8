"""COCO instance files with damage: each is raised or listed under the file to open, and reading goes on."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hf_maskformer.data.load import load
from hf_maskformer.data.problems import DatasetError


def annotations_file(root: Path) -> Path:
    return root / "train" / "instances.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][1].update(category_id=5),
            r"annotation 11 of image 100 \(0\.png\) has category_id 5.*3, 7",
        ),
        (
            lambda c: c["annotations"][1].update(image_id=999),
            r"annotation 11 has image_id 999, which is not in images",
        ),
        (
            lambda c: c["annotations"][1].update(segmentation="x"),
            r"annotation 11 of image 100 \(0\.png\): segmentation must be",
        ),
        (
            lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3]]),
            r"annotation 11 of image 100 \(0\.png\): polygon 0",
        ),
        (
            lambda c: c["annotations"][0]["segmentation"].update(size=[8, 6]),
            r"annotation 10 of image 100 \(0\.png\): its RLE has size \[8, 6\], the image has \[6, 8\]",
        ),
        (
            lambda c: c["annotations"][0]["segmentation"].update(counts="04"),
            r"annotation 10 of image 100 \(0\.png\): RLE counts cover 4 pixels",
        ),
        (lambda c: c["images"][0].update(width=9), r"0\.png is 8x6 .*image 100 of .*instances\.json is 9x6"),
        (lambda c: c["images"][0].update(file_name="z.png"), r"image 100 is z\.png, which is not in "),
        (lambda c: c["images"].append(c["images"][0]), r"image id 100 stands twice"),
        (lambda c: c["categories"].append(c["categories"][0]), r"category id 7 stands twice"),
        (lambda c: c.pop("categories"), r"has no list categories; keys found: images, annotations"),
        (lambda c: c.update(images=[], annotations=[]), r"its list of images is empty"),
    ],
)
def test_damage_is_named(
    instance_folder: Path, cache_dir: str, edit_json: Callable, change: Callable, message: str
) -> None:
    edit_json(annotations_file(instance_folder), change)
    with pytest.raises(ValueError, match=r"instances\.json") as raised:
        load(instance_folder, cache_dir=cache_dir)
    assert raised.match(message)


def test_broken_json_is_named(instance_folder: Path, cache_dir: str) -> None:
    annotations_file(instance_folder).write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances\.json: is not valid JSON"):
        load(instance_folder, cache_dir=cache_dir)


def annotation(number: int, **values: object) -> Callable[[dict], object]:
    return lambda content: content["annotations"][number].update(values)


def image(number: int, **values: object) -> Callable[[dict], object]:
    return lambda content: content["images"][number].update(values)


def without(part: str, number: int, key: str) -> Callable[[dict], object]:
    return lambda content: content[part][number].pop(key)


ALL_IDS = [[10, 11, 12], []]
REST = [[10, 12], []]  # without annotation 11
FIRST = [[10, 11, 12]]  # without image 101
# (change, kind, file, words of the message, segment ids of the rows that are left)
ERRORS: dict[str, tuple[Callable[[dict], object], str, str, str, list]] = {
    "two points": (annotation(1, segmentation=[[1, 1, 4, 4]]), "broken_mask", "", "annotation 11 .*3 points", REST),
    "no number": (
        annotation(1, segmentation=[[1, 1, 4, 4, float("nan"), 2]]),
        "broken_mask",
        "",
        "annotation 11 .*finite",
        REST,
    ),
    "text for a number": (
        annotation(1, segmentation=[[1, 1, 4, 4, "x", 2]]),
        "broken_mask",
        "",
        "annotation 11 .*no number",
        REST,
    ),
    "size": (
        annotation(1, segmentation={"size": [8, 6], "counts": [48]}),
        "size_mismatch",
        "",
        r"annotation 11 .*\[8, 6\]",
        REST,
    ),
    "size is no list": (
        annotation(1, segmentation={"size": 8, "counts": [48]}),
        "broken_mask",
        "",
        "annotation 11 ",
        REST,
    ),
    "counts do not fill": (
        annotation(1, segmentation={"size": [6, 8], "counts": [40, 3]}),
        "broken_mask",
        "",
        "annotation 11 .*cover 43",
        REST,
    ),
    "text does not fill": (
        annotation(1, segmentation={"size": [6, 8], "counts": "04"}),
        "broken_mask",
        "",
        "annotation 11 .*cover 4",
        REST,
    ),
    "counts are no code": (
        annotation(1, segmentation={"size": [6, 8], "counts": "~"}),
        "broken_mask",
        "",
        "annotation 11 .*COCO string",
        REST,
    ),
    "no counts": (annotation(1, segmentation={"size": [6, 8]}), "broken_mask", "", "annotation 11 .*counts", REST),
    "no segmentation": (without("annotations", 1, "segmentation"), "broken_mask", "", "annotation 11 ", REST),
    "unknown category": (annotation(1, category_id=5), "unknown_label", "", "annotation 11 .*category_id 5", REST),
    "category is a list": (annotation(1, category_id=[7]), "unknown_label", "", r"category_id \[7\]", REST),
    "no category": (without("annotations", 1, "category_id"), "unknown_label", "", "has no category_id", REST),
    "unknown image": (annotation(1, image_id=999), "broken_record", "", "annotation 11 .*image_id 999", REST),
    "no image": (without("annotations", 1, "image_id"), "broken_record", "", "annotation 11 has no image_id", REST),
    "no annotation id": (without("annotations", 1, "id"), "broken_record", "", "has no id", REST),
    "crowd is a text": (annotation(1, iscrowd="no"), "broken_record", "", "iscrowd 'no'", REST),
    "annotation is a number": (
        lambda c: c["annotations"].__setitem__(1, 5),
        "broken_record",
        "",
        "annotation 1 of the list",
        REST,
    ),
    "no file name": (without("images", 1, "file_name"), "broken_record", "", "image 101 has no file_name", FIRST),
    "null height": (image(1, height=None), "broken_record", "", "image 101 .*height None", FIRST),
    "no width": (without("images", 1, "width"), "broken_record", "", "image 101 .*has no width", FIRST),
    "width 0": (image(1, width=0), "broken_record", "", "image 101 .*width 0", FIRST),
    "no image id": (
        without("images", 1, "id"),
        "broken_record",
        "",
        r"image 1 of the list \(1\.png\) has no id",
        FIRST,
    ),
    "image is a text": (lambda c: c["images"].append("x"), "broken_record", "", "image 2 of the list", ALL_IDS),
    "repeated image id": (image(1, id=100), "duplicate", "", "image id 100 stands twice", FIRST),
    "repeated file": (image(1, file_name="0.png"), "duplicate", "", "images 100 and 101 .*0.png", FIRST),
    "repeated path": (image(1, file_name="./0.png"), "duplicate", "", "images 100 and 101 .*0.png", FIRST),
    "other size": (image(0, width=9), "size_mismatch", "images/0.png", "8x6", [[]]),
    "repeated category": (
        lambda c: c["categories"].append({"id": 7, "name": "wolf"}),
        "duplicate",
        "",
        "category id 7",
        ALL_IDS,
    ),
    "no category id": (
        lambda c: c["categories"].append({"name": "x"}),
        "broken_record",
        "",
        "category 2 .*no id",
        ALL_IDS,
    ),
    "category is a text": (
        lambda c: c["categories"].append("x"),
        "broken_record",
        "",
        "category 2 of the list",
        ALL_IDS,
    ),
}
WARNINGS: dict[str, tuple[Callable[[dict], object], str, str, list]] = {
    "empty polygons": (annotation(0, segmentation=[]), "empty_mask", "annotation 10 ", [[11, 12], []]),
    "no pixel": (
        annotation(0, segmentation={"size": [6, 8], "counts": [48]}),
        "empty_mask",
        "annotation 10 ",
        [[11, 12], []],
    ),
    "box": (annotation(0, bbox=[0, 0, 4, 5.5]), "box_mismatch", r"annotation 10 .*5\.5", ALL_IDS),
    "box is none": (annotation(0, bbox=None), "box_mismatch", "annotation 10 .*None", ALL_IDS),
    "area": (annotation(0, area=None), "broken_record", "annotation 10 .*area None", ALL_IDS),
    "repeated id": (annotation(1, id=10), "duplicate", "annotation id 10 stands 2 times", [[10, 10, 12], []]),
    "identical": (
        lambda c: c["annotations"].append({**c["annotations"][0], "id": 20}),
        "duplicate",
        "annotations 10 and 20",
        [[10, 11, 12, 20], []],
    ),
}


def segment_ids(rows: list[dict]) -> list[list[int]]:
    return [[segment["id"] for segment in row["segments"]] for row in rows]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_raised_or_listed(
    name: str, instance_folder: Path, edit_json: Callable, read_rows: Callable
) -> None:
    change, kind, file, words, left = ERRORS[name]
    if name in ("other size", "no image id"):  # nothing of an image that is left out is reported a second time
        edit_json(
            annotations_file(instance_folder),
            lambda c: c.update(annotations=c["annotations"] * (name != "other size")),
        )
    edit_json(annotations_file(instance_folder), change)
    with pytest.raises(DatasetError, match=words) as raised:
        read_rows(instance_folder, "raise")
    expected = (kind, str(instance_folder / "train" / (file or "instances.json")))
    assert (raised.value.problem.kind, raised.value.problem.file) == expected
    rows, problems = read_rows(instance_folder, "list")
    found = [problem for problem in problems.found if problem.kind != "unlisted_file"]
    assert [(problem.kind, problem.file) for problem in found] == [expected]
    assert re.search(words, found[0].message)
    assert segment_ids(rows) == left


@pytest.mark.parametrize("name", WARNINGS)
@pytest.mark.parametrize("mode", ["raise", "skip", "list"])
def test_warnings_stop_nothing(
    name: str, mode: str, instance_folder: Path, edit_json: Callable, read_rows: Callable
) -> None:
    change, kind, words, left = WARNINGS[name]
    edit_json(annotations_file(instance_folder), change)
    rows, problems = read_rows(instance_folder, mode)
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        (kind, str(annotations_file(instance_folder)))
    ]
    assert re.search(words, problems.found[0].message)
    assert segment_ids(rows) == left


def test_files_are_named(instance_folder: Path, edit_json: Callable, read_rows: Callable) -> None:
    images = instance_folder / "train" / "images"
    (images / "1.png").write_bytes(b"")
    (images / "text.jpg").write_text("no image")
    edit_json(
        annotations_file(instance_folder),
        lambda c: c["images"].extend(
            {"id": number, "file_name": name, "height": 6, "width": 8}
            for number, name in ((200, "text.jpg"), (201, "gone.png"))
        ),
    )
    Image.new("RGB", (8, 6)).save(images / "extra.png")
    rows, problems = read_rows(instance_folder, "list")
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unlisted_file", str(images / "extra.png")),
        ("unreadable_file", str(images / "1.png")),
        ("unreadable_file", str(images / "text.jpg")),
        ("missing_file", str(images / "gone.png")),
    ]
    assert segment_ids(rows) == [[10, 11, 12]]


def test_warnings_come_back_with_the_stored_index(
    instance_folder: Path, cache_dir: str, edit_json: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(annotations_file(instance_folder), annotation(0, bbox=[3, 3, 1, 1]))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(instance_folder, cache_dir=cache_dir)
        assert caplog.text.count("annotation 10 of image 100 (0.png) has bbox [3.0, 3.0, 1.0, 1.0]") == 1


@pytest.mark.parametrize(
    "box", [[0.9, 0.9, 3.1, 3.1], [-5, -5, 9, 9], [0, 0, 5, 5], [0.0, 0.0, 4.0, 4.0], [-1, -1, 6, 6]]
)
def test_boxes_within_a_pixel_after_clipping_are_no_problem(
    box: list, instance_folder: Path, edit_json: Callable, read_rows: Callable
) -> None:
    edit_json(annotations_file(instance_folder), annotation(0, bbox=box))
    rows, problems = read_rows(instance_folder, "raise")
    assert problems.found == []
    assert rows[0]["segments"][0]["bbox"] == box


def test_a_box_may_be_that_of_the_outline(instance_folder: Path, edit_json: Callable, read_rows: Callable) -> None:
    """A thin spike fills no pixel, but COCO's box holds it."""
    spike = [0, 0, 2, 0, 2, 2, 7.9, 2.05, 2, 2.1, 2, 4, 0, 4]
    edit_json(annotations_file(instance_folder), annotation(0, segmentation=[spike], bbox=[0, 0, 7.9, 4]))
    assert read_rows(instance_folder, "raise")[1].found == []
    edit_json(annotations_file(instance_folder), annotation(0, bbox=[0, 0, 5, 4]))
    assert [problem.kind for problem in read_rows(instance_folder, "raise")[1].found] == ["box_mismatch"]


def test_correct_annotations_raise_no_alarm(shared_data: Path, tmp_path: Path, read_rows: Callable) -> None:
    _, problems = read_rows(shared_data / "nuclei", "list", split="val", format="coco_instance")
    assert problems.found == []
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(shared_data / "coco_panoptic_sample" / "input_images")
    content = (shared_data / "coco_panoptic_sample" / "panoptic_coco_detection_format.json").read_text()
    (tmp_path / "train" / "instances.json").write_text(content)
    rows, problems = read_rows(tmp_path, "list")
    assert problems.found == []
    assert [len(row["segments"]) for row in rows] == [18, 32]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 300 + ".png", "which is not in"),
        ("a\0.png", r"file_name 'a\\x00\.png'"),
        ("\ud800.png", "file_name .*ud800"),
    ],
)
def test_names_that_no_file_can_have(name: str, words: str, instance_folder: Path, edit_json: Callable) -> None:
    edit_json(annotations_file(instance_folder), image(1, file_name=name))
    with pytest.raises(DatasetError, match=words):
        load(instance_folder, cache_dir=str(instance_folder / "cache"))


def test_a_category_without_a_name_is_called_by_its_id(
    instance_folder: Path, edit_json: Callable, cache_dir: str
) -> None:
    edit_json(annotations_file(instance_folder), lambda c: c["categories"][0].update(name=None))
    assert load(instance_folder, cache_dir=cache_dir).label_spec.id2label == {0: "cat", 1: "7"}


def test_whole_numbers_with_a_point_are_ids(instance_folder: Path, edit_json: Callable, read_rows: Callable) -> None:
    def change(content: dict) -> None:
        content["images"][0]["id"] = 100.0
        content["annotations"][1]["image_id"] = 100.0

    edit_json(annotations_file(instance_folder), change)
    rows, problems = read_rows(instance_folder, "raise")
    assert ([row["image_id"] for row in rows], problems.found) == (["100", "101"], [])
    assert segment_ids(rows) == ALL_IDS


def test_unused_folders_below_the_images_are_reported(
    instance_folder: Path, edit_json: Callable, read_rows: Callable
) -> None:
    images = instance_folder / "train" / "images"
    edit_json(annotations_file(instance_folder), image(1, file_name="./used/1.png"))
    for folder in ("used", "unused"):
        (images / folder).mkdir()
        for name in ("x.png", "y.png"):
            Image.new("RGB", (8, 6)).save(images / folder / name)
    (images / "1.png").rename(images / "used" / "1.png")
    (images / "unused" / "above").symlink_to(images)  # is not walked in circles
    rows, problems = read_rows(instance_folder, "raise")
    assert len(rows) == 2
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unlisted_file", str(images / file)) for file in ("unused", "used/x.png", "used/y.png")
    ]
    assert "unused: none of its 2 file(s), such as x.png, is listed in" in problems.found[0].message
