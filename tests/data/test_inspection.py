"""`inspect_dataset`: exact tables of hand-sized folders, and what is planted in broken copies of real sets."""

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import coco_breaker, dataset_breaker
from data.dataset_breaker import Planted
from hf_maskformer.cli.inspect_dataset import draw_sheet
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.inspection_report import DatasetReport, ImageFacts, SplitReport, Spread
from hf_maskformer.data.inspection_table import format_report
from hf_maskformer.data.problems import Problem
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle


def split_of(report: DatasetReport, split: str | None, format: str | None = None) -> SplitReport:
    (found,) = [entry for entry in report.splits if entry.split == split and format in (None, entry.format)]
    return found


def problems_of(report: DatasetReport) -> list[tuple[str, str, bool]]:
    return [(entry.problem.kind, Path(entry.problem.file).name, entry.refused) for entry in report.problems]


# --- hand-sized folders ----------------------------------------------------------------------------------------------


def test_the_table_of_semantic_maps(semantic_folder: Path) -> None:
    report = inspect_dataset(semantic_folder)
    train = split_of(report, "train")
    assert (train.format, train.images, train.sizes) == ("semantic_maps", 2, (((6, 8), 2),))
    assert [(c.name, c.isthing, c.images, c.segments, c.pixels, c.share) for c in train.classes] == [
        ("road", False, 1, 1, 23, 23 / 96),
        ("tree", False, 1, 1, 24, 24 / 96),
        ("sky", False, 1, 1, 48, 48 / 96),
    ]
    assert (train.void_pixels, train.void_share) == (1, 1 / 96)
    assert (train.objects, train.dimensions["aspect"]) == (Spread(1, 1.5, 2), Spread(8 / 6, 8 / 6, 8 / 6))
    assert (train.overlapping, train.empty, train.modes) == ((), (), {"RGB": 2})
    assert split_of(report, "val").unused_classes == ["sky"]


def test_the_same_picture_in_two_splits_is_a_leak(semantic_folder: Path) -> None:
    report = inspect_dataset(semantic_folder)
    assert problems_of(report) == [("duplicate", "0.png", False)]
    message = report.problems[0].problem.message
    assert re.search(r"val/images/0\.png is the same image as .*train/images/0\.png, which is in split train", message)
    assert problems_of(inspect_dataset(semantic_folder, split="val")) == []


def test_overlap_crowds_and_images_without_objects(instance_folder: Path) -> None:
    train = split_of(inspect_dataset(instance_folder), "train")
    assert [(c.name, c.isthing, c.images, c.segments, c.pixels, c.crowds, c.crowd_pixels) for c in train.classes] == [
        ("cat", True, 1, 1, 16, 0, 0),
        ("dog", True, 1, 1, 16, 1, 1),
    ]
    assert (train.overlapping, train.empty) == (("0.png",), ("1.png",))
    assert train.void_pixels == 2 * 48 - (16 + 16 - 4 + 1)
    assert train.objects == Spread(0, 1, 2)
    assert train.area_groups == {"small": 2, "medium": 0, "large": 0}
    assert (train.areas[0.0], train.areas[0.5], train.areas[1.0]) == (16, 16, 16)


def test_things_stuff_and_unnamed_pixels_of_panoptic_maps(panoptic_folder: Path) -> None:
    report = inspect_dataset(panoptic_folder)
    train = split_of(report, "train")
    assert [(c.name, c.isthing, c.segments, c.pixels, c.crowds) for c in train.classes] == [
        ("cow", True, 1, 4, 1),
        ("grass", False, 2, 39, 0),
    ]
    assert (train.void_pixels, train.overlapping) == (1, ())
    assert report.problems == ()


def test_facts_count_the_pixels_of_masks_that_overlap(overlapping_masks: np.ndarray) -> None:
    segments = [
        {"label_id": index, "iscrowd": index == 2, "rle": encode_rle(mask)["counts"], "area": 9999.0}
        for index, mask in enumerate(overlapping_masks)
    ]
    facts = ImageFacts.from_row({"file_name": "x.png", "height": 6, "width": 8, "segments": segments})
    assert (facts.pixels.tolist(), facts.overlap, facts.void) == ([16, 16, 1], 4, 48 - 29)
    assert facts.crowds.tolist() == [False, False, True]
    nothing = ImageFacts.from_row({"file_name": "x.png", "height": 6, "width": 8, "segments": []})
    assert (nothing.labels.shape, nothing.void, nothing.overlap) == ((0,), 48, 0)


@pytest.mark.parametrize(
    ("folder", "format", "splits", "segments"),
    [
        ("cityscapes_folder", "cityscapes", ["test", "train", "val"], [0, 5, 5]),
        ("ade20k_folder", "ade20k", ["training", "validation"], [3, 3]),
        ("yolo_folder", "yolo_seg", ["train", "val"], [2, 2]),
        ("object_folder", "object_masks", ["train"], [3]),
        ("id_map_folder", "instance_maps", ["train", "val"], [3, 2]),
    ],
)
def test_every_format_is_inspected(
    folder: str, format: str, splits: list[str], segments: list[int], request: pytest.FixtureRequest
) -> None:
    report = inspect_dataset(request.getfixturevalue(folder))
    assert [(split.split, split.format) for split in report.splits] == [(name, format) for name in splits]
    assert [sum(c.segments + c.crowds for c in split.classes) for split in report.splits] == segments
    assert {entry.problem.kind for entry in report.problems} <= {"duplicate", "missing_file"}
    assert format_report(report)


@pytest.mark.parametrize(
    "folder", ["semantic_folder", "instance_folder", "panoptic_folder", "object_folder", "id_map_folder"]
)
def test_relative_and_linked_roots_give_the_same_report(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(folder)
    whole = summary(inspect_dataset(root / "train"))
    assert whole[0][0] > 0
    (tmp_path / "link").symlink_to(root / "train")
    assert summary(inspect_dataset(tmp_path / "link")) == whole
    monkeypatch.chdir(root / "train")
    assert summary(inspect_dataset(".")) == whole


def summary(report: DatasetReport) -> list[tuple]:
    """What does not depend on how the root is written."""
    counts = [
        (split.images, [(c.name, c.pixels) for c in split.classes], split.void_pixels) for split in report.splits
    ]
    return [*counts, *((entry.problem.kind, Path(entry.problem.file).name) for entry in report.problems)]


def test_linked_images_and_labels_are_read(semantic_folder: Path, tmp_path: Path) -> None:
    whole = summary(inspect_dataset(semantic_folder))
    for number, file in enumerate(sorted(semantic_folder.glob("*/*/*.png"))):
        stored = file.rename(tmp_path / f"{number}.png")
        file.symlink_to(stored)
    assert summary(inspect_dataset(semantic_folder)) == whole


def test_a_split_without_annotations_is_listed(semantic_folder: Path) -> None:
    shutil.copytree(semantic_folder / "val" / "images", semantic_folder / "test" / "images")
    report = inspect_dataset(semantic_folder)
    assert [split.split for split in report.splits] == ["train", "val"]
    assert ("missing_file", "test", True) in problems_of(report)


def test_a_broken_json_ends_its_split_only(instance_folder: Path) -> None:
    shutil.copytree(instance_folder / "train", instance_folder / "val")
    (instance_folder / "train" / "instances.json").write_text("{")
    report = inspect_dataset(instance_folder)
    assert ("unreadable_file", "instances.json", True) in problems_of(report)
    assert (split_of(report, "train").images, split_of(report, "val").images) == (0, 2)
    assert "train: no images could be read" in format_report(report)


JUNK = [None, True, -1, 10**12, 3.5, "", "x", [], [1], {}, {"a": 1}, [[]], [[float("nan")] * 6], [["a"] * 6], "../a"]
JUNK += [{"size": [6, 8], "counts": [1, 2]}, {"size": "ab", "counts": "1"}, {"size": [6, 8], "counts": "\xff"}]


@pytest.mark.parametrize(("folder", "file"), [("instance", "instances.json"), ("panoptic", "panoptic.json")])
def test_no_value_of_a_json_ends_the_inspection(folder: str, file: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{folder}_folder")
    path = root / "train" / file
    content = json.loads(path.read_text())
    whole = format_report(inspect_dataset(root))
    for place in places(content):
        for value in JUNK:
            changed = copy.deepcopy(content)
            *parents, last = place
            functools.reduce(lambda part, key: part[key], parents, changed)[last] = value
            path.write_text(json.dumps(changed))
            assert format_report(inspect_dataset(root))
    path.write_text(json.dumps(content))
    assert format_report(inspect_dataset(root)) == whole


def places(content: object, above: tuple = ()) -> list[tuple]:
    """Where every value of a JSON stands; of a list the first entry only."""
    if isinstance(content, dict):
        inside = list(content.items())
    elif isinstance(content, list):
        inside = list(enumerate(content[:1]))
    else:
        return []
    return [place for key, value in inside for place in ((*above, key), *places(value, (*above, key)))]


def test_splits_with_other_classes_are_listed(instance_folder: Path, edit_json: Callable) -> None:
    shutil.copytree(instance_folder / "train", instance_folder / "val")
    edit_json(instance_folder / "val" / "instances.json", lambda content: content["categories"][0].update(name="wolf"))
    found = [entry.problem.message for entry in inspect_dataset(instance_folder).problems]
    assert any("label 1 is 'wolf' here and 'dog' there" in message for message in found)


def test_classes_without_a_name_or_with_the_same_are_listed(instance_folder: Path, edit_json: Callable) -> None:
    def change(content: dict) -> None:
        del content["categories"][0]["name"]
        content["categories"].append({"id": 9, "name": "cat"})

    edit_json(instance_folder / "train" / "instances.json", change)
    found = [entry.problem.message for entry in inspect_dataset(instance_folder).problems]
    assert any("class 7 has no name" in message for message in found)
    assert any("2 classes are named 'cat'" in message for message in found)


def test_deep_images_are_noted_and_broken_floats_found(semantic_folder: Path, deep_png: Callable) -> None:
    deep_png(semantic_folder / "train" / "images" / "0.png", 0, 3000)
    values = np.full((6, 8), 0.5, dtype=np.float32)
    values[2, 2] = np.nan
    (semantic_folder / "train" / "images" / "1.png").unlink()
    Image.fromarray(values).save(semantic_folder / "train" / "images" / "1.tif")
    report = inspect_dataset(semantic_folder, split="train")
    assert problems_of(report) == [("unreadable_file", "1.tif", True)]
    assert sum(split_of(report, "train").modes.values()) == 1
    assert "--intensity-range" in format_report(report)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, "has no split 'test'"),
        ({"format": "coco_instance"}, "shape of format coco_instance"),
        ({"task": "panoptic"}, "task 'panoptic'"),
        ({"color": 3}, "option 'color' is not known"),
    ],
)
def test_what_cannot_be_inspected_is_refused(semantic_folder: Path, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inspect_dataset(semantic_folder, **arguments)


def test_no_folder_and_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        inspect_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not have the shape of a known format"):
        inspect_dataset(tmp_path)


def test_the_text_cuts_long_lists(semantic_folder: Path) -> None:
    folder = semantic_folder / "train" / "images"
    for number in range(25):
        (folder / f"note{number:02}.txt").write_text("x")
    report = inspect_dataset(semantic_folder, split="train")
    text = format_report(report)
    assert "unlisted_file (25)" in text
    assert "  and 5 more" in text
    assert len(report.to_dict()["problems"]) == 25
    json.dumps(report.to_dict())


def test_pictures_show_every_class_rare_ones_first(semantic_folder: Path) -> None:
    from hf_maskformer.data.picture_choice import Picture, PictureChoice

    choice, spec = PictureChoice(), LabelSpec({0: "road", 1: "tree", 2: "deer"})
    for number in range(1000):
        labels = np.array([0, 1] if number != 777 else [0, 2])
        facts = ImageFacts(f"{number}", (10, 10), labels, np.array([60, 40]), np.zeros(2, dtype=bool), 0)
        split = "train" if number < 900 else "val"
        choice.add(Picture(split, "semantic_maps", spec, Path(f"{number}.png"), None), facts)
    chosen = choice.chosen()
    assert chosen[0].file.name == "777.png"
    assert len({picture.file for picture in chosen}) == 8
    assert {picture.split for picture in chosen} == {"train", "val"}


def test_overlays_do_not_depend_on_the_ids_of_annotations(instance_folder: Path, edit_json: Callable) -> None:
    """Crowds of COCO have ids above 2^31; 0 and ids that stand twice are allowed too."""

    def sheet(*ids: int) -> np.ndarray:
        def change(content: dict) -> None:
            for annotation, number in zip(content["annotations"], ids, strict=True):
                annotation["id"] = number

        edit_json(instance_folder / "train" / "instances.json", change)
        return np.asarray(draw_sheet(inspect_dataset(instance_folder).pictures))

    usual = sheet(1, 2, 3)
    for ids in ((0, 5, 900100259990), (4, 4, 4)):
        np.testing.assert_array_equal(sheet(*ids), usual)


# --- real sets, whole and broken -------------------------------------------------------------------------------------


def check_all_found(report: DatasetReport, planted: list[Planted]) -> None:
    """Each planted problem is one of those reported, by kind, file and words, and nothing else is reported."""
    problems = [entry.problem for entry in report.problems]
    missing = [entry for entry in planted if not any(is_planted(problem, entry) for problem in problems)]
    listing = "\n".join(f"  {problem.kind}: {problem.message}" for problem in problems)
    assert not missing, f"not found: {missing}\nreported:\n{listing}"
    alarms = [problem for problem in problems if not any(is_planted(problem, entry) for entry in planted)]
    assert not alarms, f"false alarms: {alarms}"


def is_planted(problem: Problem, entry: Planted) -> bool:
    return (
        problem.kind == entry.kind
        and (problem.file.endswith(entry.file) or Path(entry.file).name in problem.message)
        and all(word in problem.message for word in entry.words)
    )


def test_missed_problems_and_false_alarms_are_noticed(semantic_folder: Path) -> None:
    report = inspect_dataset(semantic_folder)
    leak = Planted("duplicate", "val/images/0.png", ("train",))
    check_all_found(report, [leak])
    with pytest.raises(AssertionError, match="false alarms"):
        check_all_found(report, [])
    with pytest.raises(AssertionError, match="not found"):
        check_all_found(report, [leak, Planted("duplicate", "val/images/1.png")])


def test_broken_camvid(shared_data: Path, tmp_path: Path) -> None:
    root = dataset_breaker.copy_pairs(shared_data / "camvid", tmp_path / "camvid")
    whole = inspect_dataset(root)
    assert whole.problems == ()
    maps = [np.asarray(Image.open(path)) for path in sorted((root / "train" / "labels").iterdir())]
    pixels = np.bincount(np.stack(maps).reshape(-1), minlength=256)
    train = split_of(whole, "train")
    assert [entry.pixels for entry in train.classes] == pixels[:11].tolist()
    assert [entry.images for entry in train.classes] == [sum((m == k).any() for m in maps) for k in range(11)]
    assert train.void_pixels == pixels[255]
    planted = dataset_breaker.break_semantic_maps(root)
    assert len(planted) >= 10
    broken = inspect_dataset(root)
    check_all_found(broken, planted)
    # 20 pairs and a twin, without 2 images whose header is broken, 3 unreadable and 1 coloured label, 1 of another
    # size, 2 without a partner; the map with one unknown value keeps its other labels
    assert [split.images for split in broken.splits] == [21 - 9, 5]


def test_broken_nuclei(shared_data: Path, tmp_path: Path) -> None:
    root = coco_breaker.copy_nuclei(shared_data / "nuclei", tmp_path / "nuclei")
    whole = inspect_dataset(root)
    assert whole.problems == ()
    planted = coco_breaker.break_nuclei(root)
    assert len(planted) >= 30
    broken = inspect_dataset(root)
    check_all_found(broken, planted)
    before, after = (split_of(report, "train", "coco_instance") for report in (whole, broken))
    # two unreadable images and one of another size have 23, 10 and 28 nuclei; 9 masks are lost, 1 is there twice
    assert (before.images, after.images) == (36, 33)
    assert (before.classes[0].segments, after.classes[0].segments) == (593, 593 - 23 - 10 - 28 - 9 + 1)
    before, after = (split_of(report, "train", "coco_panoptic") for report in (whole, broken))
    # of 6 images the map or its annotation is lost, with 85 nuclei; 1 category is unknown, 1 background not listed
    assert (before.images, after.images) == (36, 36 - 2 - 6)
    assert [entry.segments for entry in after.classes] == [593 - 23 - 10 - 85 - 1, 28 - 1]


def test_broken_coco_sample(shared_data: Path, tmp_path: Path) -> None:
    root = coco_breaker.copy_coco_sample(shared_data / "coco_panoptic_sample", tmp_path / "coco")
    whole = inspect_dataset(root)
    assert whole.problems == ()
    planted = coco_breaker.break_coco_sample(root)
    assert len(planted) >= 10
    broken = inspect_dataset(root)
    check_all_found(broken, planted)
    (before,), (after,) = whole.splits, broken.splits
    assert (before.images, after.images) == (2, 4)  # two added images: one whole, one whose pixels are cut off
    assert sum(entry.segments + entry.crowds for entry in before.classes) == 18 + 32
    assert sum(entry.segments + entry.crowds for entry in after.classes) == 18 + 32 - 2 + 18 + 18


def test_broken_hippocampus(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    root = dataset_breaker.copy_pairs(shared_data / "hippocampus", tmp_path / "hippocampus")
    whole = inspect_dataset(root)
    assert whole.problems == ()
    assert [split.images for split in whole.splits] == [20, 4]
    planted = dataset_breaker.break_volumes(root)
    assert len(planted) >= 10
    broken = inspect_dataset(root)
    check_all_found(broken, planted)
    # 20 volumes, 11 of them unreadable or left alone, one twin; the .nii beside a .nii.gz stands for it
    assert [split.images for split in broken.splits] == [10, 5]
    assert broken.problem_counts()["duplicate"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["camvid", "nuclei", "hippocampus", "coco_panoptic_sample"])
def test_the_whole_sets_have_no_errors(shared_data: Path, name: str) -> None:
    report = inspect_dataset(shared_data / name)
    assert report.errors == 0
    assert len(report.pictures) == (8 if name != "coco_panoptic_sample" else 2)
