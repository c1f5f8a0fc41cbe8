"""One call for every dataset: finds the format by the shape of the folder and returns rows of one schema."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_maskformer.data.ade20k import ade20k_source
from hf_maskformer.data.background import needs_background
from hf_maskformer.data.cityscapes import cityscapes_source
from hf_maskformer.data.coco_instance import coco_instance_source
from hf_maskformer.data.coco_panoptic import coco_panoptic_source
from hf_maskformer.data.dataset_index import DatasetSource, check_on_bad_sample, indexed_dataset
from hf_maskformer.data.formats import FOLDER_SHAPES, FORMAT_TASKS, Layout
from hf_maskformer.data.hub import HUB_OPTIONS, load_hub
from hf_maskformer.data.instance_maps import instance_maps_source
from hf_maskformer.data.layouts import (
    find_layouts,
    folder_layouts,
    holds_dataset_files,
    list_splits,
    sibling_layouts,
    split_layouts,
)
from hf_maskformer.data.object_masks import object_masks_source
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.sample import TASKS, check_task
from hf_maskformer.data.scenes import load_scenes
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.data.semantic_maps import semantic_maps_source
from hf_maskformer.data.yolo_seg import yolo_seg_source

__all__ = [
    "FOLDER_SHAPES",
    "FORMAT_OPTIONS",
    "FORMAT_TASKS",
    "READERS",
    "Layout",
    "SegmentationData",
    "find_layouts",
    "list_splits",
    "load",
    "open_source",
]

# Options of every format that is read from files: where the rows are stored, and how wide images become 8-bit.
FILE_OPTIONS = ("cache_dir", "intensity_range")
TASK_HINTS = {
    "semantic_maps": "; objects are read from maps of their ids (format instance_maps), one PNG per object, COCO JSON "
    "or YOLO texts"
}
HUB_MARKS = ("columns", "data_files")  # options that only the library `datasets` can serve
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # name or owner/name
FORMAT_OPTIONS: dict[str, tuple[str, ...]] = {
    "semantic_maps": ("ignore_index", "label_table", *FILE_OPTIONS),
    "coco_instance": FILE_OPTIONS,
    "coco_panoptic": FILE_OPTIONS,
    "cityscapes": FILE_OPTIONS,
    "ade20k": FILE_OPTIONS,
    "yolo_seg": FILE_OPTIONS,
    "object_masks": ("class_name", *FILE_OPTIONS),
    "instance_maps": ("class_name", *FILE_OPTIONS),
    "volumes": ("ignore_index",),
    "scenes": ("length", "seed", "image_size", "amodal"),
    "hub": HUB_OPTIONS,
}


def load(
    path_or_id: str | Path,
    split: str | None = "train",
    task: str | None = None,
    format: str | None = None,
    on_bad_sample: str = "raise",
    **options: Any,
) -> SegmentationData:
    """Opens one split of a dataset.

    Args:
        path_or_id: a folder, the id of a dataset on the Hub, or "scenes" for the built-in scenes.
        split: name of the split; None if the folder is itself one split.
        task: "semantic", "instance" or "panoptic"; None = what the format is made for.
        format: one of `FORMAT_TASKS`; None = by the shape of the folder (where a split has several formats, the task
            decides, and the one with most truth is taken without a task).
        on_bad_sample: what to do while the files are indexed and one is no readable image: "raise" a ValueError, or
            "skip": log its name and leave the row out. It is an error if no row is left. Scenes have no files.
        **options: `FORMAT_OPTIONS` of the format; with `columns` the library `datasets` reads the dataset.

    Raises:
        ValueError: no such folder, split, format, task or option, or a problem of the files; the message names what
            was found and what is allowed.
    """
    if task is not None:
        check_task(task, TASKS, "any format")
    check_on_bad_sample(on_bad_sample)
    if format is not None and format not in FORMAT_TASKS:
        raise ValueError(f"format {format!r} is not known, allowed: {', '.join(FORMAT_TASKS)}")
    if str(path_or_id) == "scenes" and format in (None, "scenes"):
        _check_options("scenes", options)
        return load_scenes(split, _task_for("scenes", FORMAT_TASKS["scenes"], task), **options)
    if is_for_hub(path_or_id, format, options):
        return load_hub(path_or_id, split, task, {**options, "on_bad_sample": on_bad_sample})
    root = Path(os.path.abspath(path_or_id))  # readers ask for the names of folders above a file
    layout = find_layouts(root, split, task, format)[0]
    _check_reader(layout)
    task = _task_for(layout.format, layout.served_tasks(), task)
    problems = Problems("skip" if on_bad_sample == "skip" else "raise")
    source = open_source(layout, root, options, problems)
    dataset = indexed_dataset(source, problems, root, options.get("cache_dir"))
    intensity_range = options.get("intensity_range")
    spec, left_out = source.label_spec, problems.left_out
    background = needs_background(task, layout.served_tasks())
    return SegmentationData(dataset, spec, task, layout.format, split, intensity_range, left_out, background)


def open_source(layout: Layout, root: Path, options: Mapping[str, Any], problems: Problems) -> DatasetSource:
    """The reader of a layout, opened; no row is read yet.

    Args:
        layout: one of `find_layouts`; volumes are refused.
        root: the dataset.
        options: `FORMAT_OPTIONS` of the format; the reader takes those that change what it reads.
        problems: where the reader reports, now and while its rows are read.
    """
    _check_reader(layout)
    _check_options(layout.format, options)
    read = {name: value for name, value in options.items() if name != "intensity_range"}  # images are not read yet
    return READERS[layout.format](layout, root, read, problems)


def is_for_hub(path_or_id: str | Path, format: str | None, options: Mapping[str, Any]) -> bool:
    """Whether the library `datasets` is to read it: asked for, the shape of an id, or a folder with its files."""
    if format is not None or set(HUB_MARKS) & set(options):
        return format in (None, "hub")
    root = Path(path_or_id)
    if root.is_dir():
        return not (split_layouts(root) or folder_layouts(root)) and holds_dataset_files(root)
    return isinstance(path_or_id, str) and HUB_ID.fullmatch(path_or_id) is not None


def _check_reader(layout: Layout) -> None:
    if layout.format not in READERS:
        raise ValueError(
            f"{layout.folder} holds volumes ({layout.images.name}/*.nii.gz): they can be inspected "
            "(hf-maskformer inspect-dataset), but not yet trained on"
        )


def _task_for(format: str, served: tuple[str, ...], task: str | None) -> str:
    if task is not None:
        check_task(task, served, f"format {format}", TASK_HINTS.get(format, ""))
    return task or served[0]


def _check_options(format: str, options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(FORMAT_OPTIONS[format]))
    if unknown:
        raise ValueError(
            f"option {unknown[0]!r} is not known for format {format}, allowed: {', '.join(FORMAT_OPTIONS[format])}"
        )


def _open_semantic_maps(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    folders = [sibling.maps for sibling in sibling_layouts(layout, root) if sibling.maps is not None]
    return semantic_maps_source(
        layout.folder, root, problems, images=layout.images, labels=layout.maps, label_folders=folders, **options
    )


def _open_coco_instance(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    assert layout.annotations is not None
    return coco_instance_source(layout.images, layout.annotations, problems)


def _open_coco_panoptic(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    assert layout.annotations is not None
    assert layout.maps is not None
    return coco_panoptic_source(layout.images, layout.annotations, layout.maps, problems)


def _open_cityscapes(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    assert layout.maps is not None
    return cityscapes_source(layout.images, layout.maps, problems)


def _open_ade20k(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    assert layout.maps is not None
    return ade20k_source(layout.images, layout.maps, root, problems)


def _open_yolo_seg(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    assert layout.maps is not None
    folders = [sibling.maps for sibling in sibling_layouts(layout, root) if sibling.maps is not None]
    return yolo_seg_source(layout.images, layout.maps, problems, layout.annotations, folders)


def _open_object_masks(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    folders = [(sibling.images, sibling.maps) for sibling in sibling_layouts(layout, root)]
    return object_masks_source(layout.images, layout.maps, problems, folders, **_class_name(options))


def _open_instance_maps(layout: Layout, root: Path, options: dict[str, Any], problems: Problems) -> DatasetSource:
    return instance_maps_source(layout.images, layout.maps, problems, **_class_name(options))


def _class_name(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name == "class_name"}


READERS: dict[str, Callable[[Layout, Path, dict[str, Any], Problems], DatasetSource]] = {
    "semantic_maps": _open_semantic_maps,
    "coco_instance": _open_coco_instance,
    "coco_panoptic": _open_coco_panoptic,
    "cityscapes": _open_cityscapes,
    "ade20k": _open_ade20k,
    "yolo_seg": _open_yolo_seg,
    "object_masks": _open_object_masks,
    "instance_maps": _open_instance_maps,
}
