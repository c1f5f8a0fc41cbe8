"""One call for every dataset: finds the format by the shape of the folder and returns rows of one schema."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_maskformer.data.coco_instance import load_coco_instance
from hf_maskformer.data.coco_panoptic import load_coco_panoptic
from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.sample import TASKS, check_task
from hf_maskformer.data.scenes import load_scenes
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.data.semantic_maps import load_semantic_maps
from hf_maskformer.model.label_spec import LabelSpec

__all__ = ["FORMAT_TASKS", "SegmentationData", "list_splits", "load"]

# The tasks that each format has the truth for, the default first.
FORMAT_TASKS: dict[str, tuple[str, ...]] = {
    "semantic_maps": ("semantic",),
    "coco_instance": ("instance", "semantic"),
    "coco_panoptic": ("panoptic", "instance", "semantic"),
    "scenes": ("panoptic", "instance", "semantic"),
}
FORMAT_OPTIONS: dict[str, tuple[str, ...]] = {
    "semantic_maps": ("ignore_index", "cache_dir", "intensity_range"),
    "coco_instance": ("cache_dir", "intensity_range"),
    "coco_panoptic": ("cache_dir", "intensity_range"),
    "scenes": ("length", "seed", "image_size", "amodal"),
}
FOLDER_SHAPES = """\
  semantic_maps: SPLIT/images/* and SPLIT/labels/*.png [and id2label.json beside the splits]
  coco_instance: SPLIT/images/* and SPLIT/instances.json
  coco_panoptic: SPLIT/images/*, SPLIT/panoptic.json and SPLIT/panoptic/*.png
  standard COCO: [annotations/]panoptic_SPLIT.json and panoptic_SPLIT/*.png, or [annotations/]instances_SPLIT.json,
                 with images in SPLIT/ or input_images/
or the built-in "scenes"; split=None takes a folder that is itself one split"""


@dataclass(frozen=True)
class Layout:
    """Where the parts of one split lie, in one format."""

    format: str
    folder: Path
    images: Path
    annotations: Path | None = None
    maps: Path | None = None


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
        path_or_id: a folder, or "scenes" for the built-in scenes.
        split: name of the split; None if the folder is itself one split.
        task: "semantic", "instance" or "panoptic"; None = what the format is made for.
        format: one of `FORMAT_TASKS`; None = by the shape of the folder (where a split has both instances.json and
            panoptic.json, the task decides, and panoptic is taken without a task).
        on_bad_sample: what to do while the files are indexed and one is no readable image: "raise" a ValueError, or
            "skip": log its name and leave the row out. It is an error if no row is left. Scenes have no files.
        **options: `FORMAT_OPTIONS` of the format: cache_dir, intensity_range=(low, high), ignore_index; for scenes
            length, seed, image_size, amodal.

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
        task = _task_for("scenes", task)
        _check_options("scenes", options)
        return load_scenes(split, task, **options)
    root = Path(path_or_id)
    layout = find_layout(root, split, task, format)
    task = _task_for(layout.format, task)
    _check_options(layout.format, options)
    intensity_range = options.pop("intensity_range", None)
    dataset, spec = READERS[layout.format](layout, root, {**options, "on_bad_sample": on_bad_sample})
    return SegmentationData(dataset, spec, task, layout.format, split, intensity_range)


def list_splits(root: str | Path) -> list[str]:
    """Names of the splits of a dataset folder, sorted."""
    root = Path(root)
    folders = {entry.name for entry in root.iterdir() if (entry / "images").is_dir()}
    return sorted(folders | set(_standard_layouts(root)))


def find_layout(root: Path, split: str | None, task: str | None, format: str | None) -> Layout:
    """The layout of a split; see `load`."""
    if not root.is_dir():
        raise ValueError(f"dataset {str(root)!r} is not a folder; allowed: a folder of one of the shapes, or 'scenes'")
    splits = list_splits(root)
    name = _split_name(root, split, splits)
    if name is None:
        found = _plain_layouts(root)
    else:
        found = [*_plain_layouts(root / name), *_standard_layouts(root).get(name, [])]
    chosen = [layout for layout in found if format in (None, layout.format)]
    if task is not None and format is None:
        # Only where a folder holds several formats; a single one is refused later with the tasks it has.
        chosen = [layout for layout in chosen if FORMAT_TASKS[layout.format][0] == task] or chosen
    if chosen:
        return chosen[0]
    folder = root / name if name is not None else root
    wanted = f"format {format}" if format else "a known format"
    raise ValueError(
        f"{folder} does not have the shape of {wanted}: it holds {_listing(folder)}. Allowed shapes:\n{FOLDER_SHAPES}"
    )


def _split_name(root: Path, split: str | None, splits: list[str]) -> str | None:
    """The folder or file part that stands for a split; None = the root itself."""
    if split is None:
        if (root / "images").is_dir() or not splits:
            return None
        if len(splits) == 1:
            return splits[0]
        raise ValueError(f"{root} has several splits, choose one with split=: {', '.join(splits)}")
    if split in splits:
        return split
    dated = [name for name in splits if name.startswith(split) and name[len(split) :].isdigit()]  # train2017
    if len(dated) == 1:
        return dated[0]
    if splits:
        raise ValueError(f"{root} has no split {split!r}; splits that exist: {', '.join(splits)}")
    hint = "; its images/ lies at the top, so pass split=None" if (root / "images").is_dir() else ""
    raise ValueError(
        f"{root} has no split {split!r} and no other{hint}: it holds {_listing(root)}. "
        f"Allowed shapes:\n{FOLDER_SHAPES}"
    )


def _plain_layouts(folder: Path) -> list[Layout]:
    """Formats whose parts all lie in the folder of the split; the one with most truth first."""
    images, found = folder / "images", []
    if not images.is_dir():
        return []
    if (folder / "panoptic.json").is_file() and (folder / "panoptic").is_dir():
        found.append(Layout("coco_panoptic", folder, images, folder / "panoptic.json", folder / "panoptic"))
    if (folder / "instances.json").is_file():
        found.append(Layout("coco_instance", folder, images, folder / "instances.json"))
    if (folder / "labels").is_dir():
        found.append(Layout("semantic_maps", folder, images))
    return found


def _standard_layouts(root: Path) -> dict[str, list[Layout]]:
    """Splits of a tree as cocodataset.org gives it, by name."""
    found: dict[str, list[Layout]] = {}
    for folder in (root / "annotations", root):
        for annotations in sorted(folder.glob("panoptic_*.json")):
            name = annotations.stem.removeprefix("panoptic_")
            maps = [parent / annotations.stem for parent in (folder, root) if (parent / annotations.stem).is_dir()]
            images = _standard_images(root, name)
            if maps and images:
                found.setdefault(name, []).append(Layout("coco_panoptic", root, images, annotations, maps[0]))
        for annotations in sorted(folder.glob("instances_*.json")):
            name = annotations.stem.removeprefix("instances_")
            images = _standard_images(root, name)
            if images:
                found.setdefault(name, []).append(Layout("coco_instance", root, images, annotations))
    return found


def _standard_images(root: Path, name: str) -> Path | None:
    folders = (root / name, root / "images" / name, root / "input_images")
    return next((folder for folder in folders if folder.is_dir()), None)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return (", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "nothing"


def _task_for(format: str, task: str | None) -> str:
    if task is not None:
        check_task(task, FORMAT_TASKS[format], f"format {format}")
    return task or FORMAT_TASKS[format][0]


def _check_options(format: str, options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(FORMAT_OPTIONS[format]))
    if unknown:
        raise ValueError(
            f"option {unknown[0]!r} is not known for format {format}, allowed: {', '.join(FORMAT_OPTIONS[format])}"
        )


def _read_semantic_maps(layout: Layout, root: Path, options: dict[str, Any]) -> tuple[Dataset, LabelSpec]:
    return load_semantic_maps(layout.folder, root, **options)


def _read_coco_instance(layout: Layout, root: Path, options: dict[str, Any]) -> tuple[Dataset, LabelSpec]:
    assert layout.annotations is not None
    return load_coco_instance(layout.images, layout.annotations, **options)


def _read_coco_panoptic(layout: Layout, root: Path, options: dict[str, Any]) -> tuple[Dataset, LabelSpec]:
    assert layout.annotations is not None
    assert layout.maps is not None
    return load_coco_panoptic(layout.images, layout.annotations, layout.maps, **options)


READERS: dict[str, Callable[[Layout, Path, dict[str, Any]], tuple[Dataset, LabelSpec]]] = {
    "semantic_maps": _read_semantic_maps,
    "coco_instance": _read_coco_instance,
    "coco_panoptic": _read_coco_panoptic,
}
