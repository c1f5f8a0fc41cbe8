"""What is found in a folder: splits in every order of folders, several formats at once, names of the same split."""

import shutil
from pathlib import Path

import pytest

from hf_maskformer.data.formats import FORMAT_TASKS, RICHEST_FIRST
from hf_maskformer.data.layouts import (
    find_layouts,
    folder_layouts,
    holds_dataset_files,
    list_splits,
    sibling_layouts,
)
from hf_maskformer.data.load import FORMAT_OPTIONS, READERS, load


def make(root: Path, *files: str) -> Path:
    """Empty files, with the folders they lie in."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def found(root: Path) -> dict[str, list[str]]:
    return {split: [layout.format for layout in find_layouts(root, split)] for split in list_splits(root)}


SHAPES: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "semantic maps": (("train/images/a.jpg", "train/labels/a.png", "val/images/a.jpg", "val/labels/a.png"), {}),
    "nested semantic maps": (("images/train/a.jpg", "labels/train/a.png", "images/val/b.jpg", "labels/val/b.png"), {}),
    "yolo": (("train/images/a.jpg", "train/labels/a.txt"), {"train": ["yolo_seg"]}),
    "nested yolo": (("images/val/a.jpg", "labels/val/a.txt"), {"val": ["yolo_seg"]}),
    "yolo in upper case": (("train/images/a.JPG", "train/labels/a.TXT"), {"train": ["yolo_seg"]}),
    "notes beside maps": (
        ("train/images/a.jpg", "train/labels/a.png", "train/labels/notes.txt", "train/labels/classes.txt"),
        {"train": ["semantic_maps"]},
    ),
    "object masks": (("train/images/a.jpg", "train/masks/a/1.png"), {"train": ["object_masks"]}),
    "nested object masks": (("images/val/a.jpg", "masks/val/a/1.png"), {"val": ["object_masks"]}),
    "objects in classes": (("train/images/a.jpg", "train/masks/a/dog/1.png"), {"train": ["object_masks"]}),
    "instance maps": (("train/images/a.jpg", "train/instance_maps/a.png"), {"train": ["instance_maps"]}),
    "nested instance maps": (("images/val/a.jpg", "instance_maps/val/a.tif"), {"val": ["instance_maps"]}),
    "named instance maps": (
        ("train/000_img.png", "train/000_masks.png", "test/000.tif", "test/000_cp_masks.TIF", "test/000_flows.tif"),
        {"test": ["instance_maps"], "train": ["instance_maps"]},
    ),
    "a map without an image": (
        ("train/images/a.jpg", "train/labels/a.png", "train/b_masks.png", "train/c.png"),
        {"train": ["semantic_maps"]},
    ),
    "image folders": (
        ("train/a/images/a.jpg", "train/a/masks/1.png", "val/a/images/a.jpg", "val/a/masks/dog/1.png"),
        {"train": ["object_masks"], "val": ["object_masks"]},
    ),
    "image folders without splits": (("a/images/a.jpg", "a/masks/1.png", "b/images/b.jpg", "b/masks/1.png"), {}),
    "volumes": (("train/images/a.nii.gz", "train/labels/a.nii.gz"), {"train": ["volumes"]}),
    "coco": (
        (
            *("annotations/panoptic_val2017.json", "annotations/panoptic_val2017/a.png", "val2017/a.jpg"),
            *("annotations/instances_val2017.json", "annotations/instances_train2017.json", "images/train2017/a.jpg"),
        ),
        {"train2017": ["coco_instance"], "val2017": ["coco_panoptic", "coco_instance"]},
    ),
    "everything in one split": (
        (
            *("train/images/a.jpg", "train/labels/a.png", "train/labels/a.txt", "train/masks/a/1.png"),
            *("train/instances.json", "train/panoptic.json", "train/panoptic/a.png", "train/instance_maps/a.png"),
        ),
        {"train": ["coco_panoptic", "coco_instance", "object_masks", "instance_maps", "yolo_seg", "semantic_maps"]},
    ),
    "cityscapes": (
        (
            *("leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", "gtFine/train/ulm/ulm_0_0_gtFine_instanceIds.png"),
            *("gtFine/cityscapes_panoptic_train.json", "gtFine/cityscapes_panoptic_train/a.png"),
            *("leftImg8bit/val/bonn/b_0_0_leftImg8bit.png", "gtFine/val/bonn/b_0_0_gtFine_labelIds.png"),
            *("gtFine/cityscapes_panoptic_val.json", "gtFine/cityscapes_panoptic_val/a.png"),
            *("leftImg8bit/test/rom/r_0_0_leftImg8bit.png",),
        ),
        {
            "test": ["cityscapes"],
            "train": ["cityscapes", "coco_panoptic"],
            "val": ["coco_panoptic", "cityscapes"],  # classes alone are less than panoptic truth
        },
    ),
    "ade20k": (
        ("images/training/a.jpg", "annotations/training/a.png", "images/validation/a.jpg", "ade20k_instance_val.json"),
        {"training": ["ade20k"], "validation": ["coco_instance"]},
    ),
}
SHAPES["semantic maps"][1].update(train=["semantic_maps"], val=["semantic_maps"])
SHAPES["nested semantic maps"][1].update(train=["semantic_maps"], val=["semantic_maps"])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes(shape: str, tmp_path: Path) -> None:
    files, expected = SHAPES[shape]
    assert found(make(tmp_path, *files)) == expected


def test_every_format_has_tasks_options_and_a_reader() -> None:
    assert set(RICHEST_FIRST) == set(FORMAT_TASKS) - {"scenes", "hub"}
    assert set(FORMAT_OPTIONS) == set(FORMAT_TASKS)
    assert set(READERS) == set(RICHEST_FIRST) - {"volumes"}


def test_the_task_decides_which_comes_first(tmp_path: Path) -> None:
    make(tmp_path, *SHAPES["everything in one split"][0])
    formats = [layout.format for layout in find_layouts(tmp_path, "train", "semantic")]
    objects = ["coco_instance", "object_masks", "instance_maps", "yolo_seg"]
    assert formats == ["semantic_maps", "coco_panoptic", *objects]
    formats = [layout.format for layout in find_layouts(tmp_path, "train", "instance")]
    assert formats == [*objects, "coco_panoptic", "semantic_maps"]
    assert [layout.format for layout in find_layouts(tmp_path, "train", format="yolo_seg")] == ["yolo_seg"]


def test_richer_truth_serves_a_task_that_no_format_is_made_for(tmp_path: Path) -> None:
    make(tmp_path, "train/images/a.jpg", "train/labels/a.png", "train/panoptic.json", "train/panoptic/a.png")
    assert find_layouts(tmp_path, "train", "instance")[0].format == "coco_panoptic"


@pytest.mark.parametrize(
    ("split", "folder"),
    [("train", "train2017"), ("val", "validation"), ("valid", "validation"), ("validation", "validation")],
)
def test_names_of_the_same_split(split: str, folder: str, tmp_path: Path) -> None:
    make(tmp_path, "train2017/images/a.jpg", "train2017/labels/a.png")
    make(tmp_path, "validation/images/a.jpg", "validation/labels/a.png")
    assert find_layouts(tmp_path, split)[0].folder == tmp_path / folder


def test_two_folders_for_one_name_are_not_guessed(tmp_path: Path) -> None:
    make(tmp_path, "train2014/images/a.jpg", "train2017/images/a.jpg")
    with pytest.raises(ValueError, match="has no split 'train'; splits that exist: train2014, train2017"):
        find_layouts(tmp_path, "train")


def test_siblings_are_the_splits_of_the_same_format(tmp_path: Path) -> None:
    make(tmp_path, *SHAPES["semantic maps"][0], "test/images/a.jpg", "test/labels/a.txt")
    layout = find_layouts(tmp_path, "val")[0]
    assert [sibling.folder.name for sibling in sibling_layouts(layout, tmp_path)] == ["train", "val"]
    alone = find_layouts(tmp_path / "val", None)[0]
    assert sibling_layouts(alone, tmp_path / "val") == [alone]


def test_nested_semantic_maps_are_read(semantic_folder: Path, cache_dir: str) -> None:
    for part in ("images", "labels"):
        (semantic_folder / part).mkdir()
        for split in ("train", "val"):
            (semantic_folder / split / part).rename(semantic_folder / part / split)
    for split in ("train", "val"):
        (semantic_folder / split).rmdir()
    data = load(semantic_folder, cache_dir=cache_dir)
    assert (data.format, len(data), data.row(0)["file_name"]) == ("semantic_maps", 2, "images/train/0.png")
    (semantic_folder / "id2label.json").unlink()
    assert load(semantic_folder, split="val", cache_dir=cache_dir).label_spec.num_labels == 3  # 2 is in train only


def test_one_image_is_no_folder_of_an_image(tmp_path: Path) -> None:
    make(tmp_path, "train/images/a.jpg", "train/masks/a.png")
    with pytest.raises(ValueError, match=r"train does not have the shape of a known format: it holds images/, masks/"):
        find_layouts(tmp_path, "train")


def test_a_folder_that_is_one_split(tmp_path: Path) -> None:
    make(tmp_path, "images/a.jpg", "labels/a.txt")
    (tmp_path / "data.yaml").write_text("names: [cat]")
    (layout,) = folder_layouts(tmp_path)
    assert (layout.format, layout.annotations) == ("yolo_seg", tmp_path / "data.yaml")
    assert find_layouts(tmp_path, None) == [layout]


def test_the_message_lists_what_was_found_and_what_is_allowed(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/images/{number}.jpg" for number in range(3)), *(f"train/x{n}.csv" for n in range(12)))
    with pytest.raises(ValueError, match=r"it holds images/, x0\.csv, .* and 3 more\. Allowed shapes:\n") as error:
        find_layouts(tmp_path, "train")
    assert all(f"{name}:" in str(error.value) for name in (*READERS, "volumes"))


def test_files_of_the_library_datasets(tmp_path: Path) -> None:
    assert not holds_dataset_files(tmp_path)
    assert holds_dataset_files(make(tmp_path / "tables", "data/train-00000.parquet"))
    assert holds_dataset_files(make(tmp_path / "arrow", "data-00000.arrow"))
    assert holds_dataset_files(make(tmp_path / "saved", "dataset_dict.json"))
    assert not holds_dataset_files(make(tmp_path / "maps", "train/images/a.jpg", "train/labels/a.png"))


def test_data_yaml_without_a_folder_that_exists(tmp_path: Path) -> None:
    make(tmp_path, "images/train/a.jpg", "labels/train/a.txt", "other/a.jpg")
    (tmp_path / "data.yaml").write_text("train: [images/train]\nval: null\ntest: other\n")
    assert list_splits(tmp_path) == ["train"]


def test_a_broken_data_yaml_of_another_format_is_not_used(tmp_path: Path) -> None:
    make(tmp_path, "train/images/a.jpg", "train/labels/a.png", "data.yaml")
    assert list_splits(tmp_path) == ["train"]
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(ValueError, match=r"data\.yaml: must be an object"):
        list_splits(tmp_path)
