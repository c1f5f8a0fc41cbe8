"""Which datasets a folder holds: splits and formats are found by the names of folders and files alone.

No annotation is opened here, except the data.yaml of a YOLO dataset, which may say where its splits lie.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hf_maskformer.data.formats import FOLDER_SHAPES, RICHEST_FIRST, Layout
from hf_maskformer.data.instance_maps import has_named_maps
from hf_maskformer.data.label_files import LABEL_SUFFIXES, LOSSY_SUFFIXES
from hf_maskformer.data.problems import DatasetError
from hf_maskformer.data.published_trees import ade20k_splits, cityscapes_splits, coco_splits
from hf_maskformer.data.volumes import VOLUME_SUFFIXES
from hf_maskformer.data.yolo_yaml import (
    CLASS_NAMES_TEXT,
    find_data_yaml,
    read_data_yaml,
    yaml_images,
    yolo_label_folder,
)

# Names that datasets give to the same split.
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # by save_to_disk
TABLE_FILES = ("*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")
LISTED_NAMES = 10
MAP_FOLDERS = ("labels", "masks", "instance_maps")  # what stands beside images/


def list_splits(root: str | Path) -> list[str]:
    """Names of the splits of a dataset folder, sorted."""
    return sorted(split_layouts(Path(root)))


def find_layouts(root: Path, split: str | None, task: str | None = None, format: str | None = None) -> list[Layout]:
    """The layouts that a split can be read by, the one with most truth first.

    With a task those made for it come first, then those that also have its truth; where none has it, all are
    returned as they are. Ids of objects in labels/ or masks/ look as classes do: they are read as instance maps only
    where the format says so.

    Raises:
        ValueError: no such folder or split, or a shape that is not known; the message lists what was found and what is
            allowed.
    """
    if not root.is_dir():
        raise ValueError(
            f"dataset {str(root)!r} is not a folder; allowed: a folder of one of the shapes, or 'scenes', or the "
            f"id of a dataset on the Hub. Shapes:\n{FOLDER_SHAPES}"
        )
    splits = split_layouts(root)
    name = _split_name(root, split, splits)
    found = folder_layouts(root) if name is None else splits[name]
    chosen = [layout for layout in found if format in (None, layout.format)]
    if format == "instance_maps" and not chosen:
        chosen = _unnamed_instance_maps(root, name)
    if task is not None:
        ranks = {layout: _task_rank(layout, task) for layout in chosen}
        chosen.sort(key=lambda layout: ranks[layout])  # stable: richer truth stays first
    if chosen:
        return chosen
    folder = root / name if name is not None and (root / name).is_dir() else root
    wanted = f"format {format}" if format else "a known format"
    unnamed = [] if format else _map_folders(root, name)
    asked = "pass format='instance_maps' (--format instance_maps)"
    hint = f"; if the maps in {unnamed[0][2]} hold ids of objects, {asked}" if unnamed else ""
    raise ValueError(
        f"{folder} does not have the shape of {wanted}: it holds {_listing(folder)}{hint}. Allowed shapes:\n"
        f"{FOLDER_SHAPES}"
    )


def _unnamed_instance_maps(root: Path, name: str | None) -> list[Layout]:
    """The layout of instance maps in labels/ or masks/, if there is one.

    Raises:
        ValueError: both hold maps.
    """
    found = [Layout("instance_maps", folder, images, maps=maps) for folder, images, maps in _map_folders(root, name)]
    if len(found) > 1:
        both = " and ".join(str(layout.maps) for layout in found)
        raise ValueError(f"{both} both hold maps: name the folder of those with ids of objects instance_maps")
    return found


def _map_folders(root: Path, name: str | None) -> list[tuple[Path, Path, Path]]:
    """(folder of the layout, images, maps) of each labels/ or masks/ of a split that holds files of label maps."""
    folder = root if name is None else root / name
    places = [(folder, folder / "images", folder / part) for part in ("labels", "masks")]
    if name is not None:
        places += [(root, root / "images" / name, root / part / name) for part in ("labels", "masks")]
    suffixes = (*LABEL_SUFFIXES, *LOSSY_SUFFIXES)
    return [
        (folder, images, maps)
        for folder, images, maps in places
        if images.is_dir() and any(entry.name.lower().endswith(suffixes) for entry in _entries(maps))
    ]


def _task_rank(layout: Layout, task: str) -> int:
    """0: made for the task, 1: has its truth, 2: has not."""
    tasks = layout.served_tasks()
    return 0 if tasks[0] == task else 1 if task in tasks else 2


def sibling_layouts(layout: Layout, root: Path) -> list[Layout]:
    """The layouts of all splits in the format of `layout`, itself among them: what classes are inferred from."""
    others = [other for layouts in split_layouts(root).values() for other in layouts if other.format == layout.format]
    return others if layout in others else [layout, *others]


def split_layouts(root: Path) -> dict[str, list[Layout]]:
    """Splits by name, each with its layouts; a folder with images of an unknown shape is a split without a layout."""
    found: dict[str, list[Layout]] = {}
    for finder in (_folder_splits, _nested_splits, coco_splits, cityscapes_splits, ade20k_splits):
        for name, layouts in finder(root).items():
            found.setdefault(name, []).extend(layouts)
    for name, layout in _yaml_splits(root, required=not found).items():
        if not any(other.images.resolve() == layout.images.resolve() for others in found.values() for other in others):
            found.setdefault(name, []).append(layout)
    return {name: _richest_first(layouts) for name, layouts in found.items()}


def _richest_first(layouts: list[Layout]) -> list[Layout]:
    return sorted(layouts, key=lambda layout: (-len(layout.served_tasks()), RICHEST_FIRST.index(layout.format)))


def _split_name(root: Path, split: str | None, splits: dict[str, list[Layout]]) -> str | None:
    """The name that a split has in this dataset; None = the root itself."""
    at_top = bool(folder_layouts(root)) or ((root / "images").is_dir() and not splits)
    if split is None:
        if at_top or not splits:
            return None
        if len(splits) == 1:
            return next(iter(splits))
        raise ValueError(f"{root} has several splits, choose one with split=: {', '.join(sorted(splits))}")
    if split in splits:
        return split
    also = {name for names in SPLIT_NAMES if split in names for name in names}
    for fits in (re.compile(rf"{re.escape(split)}\d+").fullmatch, also.__contains__):  # train2017; validation
        candidates = [name for name in splits if fits(name)]
        if len(candidates) == 1:
            return candidates[0]
    if splits:
        raise ValueError(f"{root} has no split {split!r}; splits that exist: {', '.join(sorted(splits))}")
    images = "images/ lies" if (root / "images").is_dir() else "images lie"
    hint = f"; its {images} at the top, so pass split=None (on the command line: none)" if at_top else ""
    raise ValueError(
        f"{root} has no split {split!r} and no other{hint}: it holds {_listing(root)}. "
        f"Allowed shapes:\n{FOLDER_SHAPES}"
    )


def holds_dataset_files(folder: Path) -> bool:
    """Whether the library `datasets` can read a folder: parquet or arrow files, or what save_to_disk wrote."""
    if any((folder / name).is_file() for name in SAVED_DATASET_FILES):
        return True
    return any(next(folder.glob(pattern), None) for pattern in TABLE_FILES)


# --- one folder that is one split ------------------------------------------------------------------------------------


def folder_layouts(folder: Path) -> list[Layout]:
    """Formats whose parts all lie in one folder, the one with most truth first."""
    images, found = folder / "images", []
    if holds_image_folders(folder):
        found.append(Layout("object_masks", folder, folder))
    if has_named_maps(entry.name for entry in _entries(folder)):
        found.append(Layout("instance_maps", folder, folder))
    if not images.is_dir() or _nested_names(folder):
        return found
    if (folder / "panoptic.json").is_file() and (folder / "panoptic").is_dir():
        found.append(Layout("coco_panoptic", folder, images, folder / "panoptic.json", folder / "panoptic"))
    if (folder / "instances.json").is_file():
        found.append(Layout("coco_instance", folder, images, folder / "instances.json"))
    parts = {part: folder / part for part in MAP_FOLDERS}
    found += _pair_layouts(folder, images, parts, (folder, folder.parent))
    return _richest_first(found)


def _pair_layouts(
    folder: Path, images: Path, parts: dict[str, Path], yaml_folders: tuple[Path, ...]
) -> Iterator[Layout]:
    """Formats of a folder of images and others, `parts`, each of one of `MAP_FOLDERS`."""
    labels, masks, instance_maps = (parts[part] for part in MAP_FOLDERS)
    if labels.is_dir():
        names = [entry.name.lower() for entry in _entries(labels)]
        maps = any(name.endswith(LABEL_SUFFIXES) for name in names)
        volumes = any(name.endswith(VOLUME_SUFFIXES) for name in names)
        texts = {name.removesuffix(".txt") for name in names if name.endswith(".txt") and name != CLASS_NAMES_TEXT}
        if (maps or volumes) and texts:  # a note beside label maps makes no YOLO dataset
            texts &= {Path(entry.name.lower()).stem for entry in _entries(images)}
        if texts:
            yield Layout("yolo_seg", folder, images, find_data_yaml(*yaml_folders), labels)
        if volumes:
            yield Layout("volumes", folder, images, maps=labels)
        if maps or not (texts or volumes):
            yield Layout("semantic_maps", folder, images, maps=labels)
    if masks.is_dir() and any(entry.is_dir() for entry in _entries(masks)):
        yield Layout("object_masks", folder, images, maps=masks)
    if instance_maps.is_dir():
        yield Layout("instance_maps", folder, images, maps=instance_maps)


def holds_image_folders(folder: Path) -> bool:
    """Whether a folder holds one folder for each image (NAME/images/* and NAME/masks/*)."""
    return any(_is_image_folder(Path(entry.path)) for entry in _entries(folder) if entry.is_dir())


def _is_image_folder(folder: Path) -> bool:
    """One image with masks, none of which is a folder named after it: that would be a split of one image."""
    images, masks = folder / "images", folder / "masks"
    if not (images.is_dir() and masks.is_dir()) or any(folder.name in names for names in SPLIT_NAMES):
        return False
    names = [Path(entry.name).stem for entry in _entries(images) if entry.is_file()]
    inside = _entries(masks)
    return len(names) == 1 and bool(inside) and all(entry.is_file() or entry.name != names[0] for entry in inside)


# --- several splits --------------------------------------------------------------------------------------------------


def _folder_splits(root: Path) -> dict[str, list[Layout]]:
    """SPLIT/..."""
    if holds_image_folders(root):
        return {}
    folders = [Path(entry.path) for entry in _entries(root) if entry.is_dir()]
    found = {folder.name: folder_layouts(folder) for folder in folders}
    return {name: layouts for name, layouts in found.items() if layouts or (root / name / "images").is_dir()}


def _nested_splits(root: Path) -> dict[str, list[Layout]]:
    """images/SPLIT with a folder SPLIT in one of `MAP_FOLDERS`."""
    found = {}
    for name in _nested_names(root):
        parts = {part: root / part / name for part in MAP_FOLDERS}
        found[name] = list(_pair_layouts(root, root / "images" / name, parts, (root,)))
    return found


def _nested_names(root: Path) -> list[str]:
    """Folders of images/ that are also in one of `MAP_FOLDERS`."""
    images = root / "images"
    if not images.is_dir():
        return []
    return [
        entry.name
        for entry in _entries(images)
        if entry.is_dir() and any((root / part / entry.name).is_dir() for part in MAP_FOLDERS)
    ]


def _yaml_splits(root: Path, required: bool) -> dict[str, Layout]:
    """The splits that the data.yaml of a YOLO dataset names, where their folders exist.

    A file that cannot be read is an error only if it is `required`, because there are no other splits: the reader of
    a YOLO split will say so, and other formats need none.
    """
    path = find_data_yaml(root)
    if path is None:
        return {}
    try:
        content = read_data_yaml(path)
    except DatasetError:
        if required:
            raise
        return {}
    found = {}
    for name in ("train", "val", "test"):
        images = yaml_images(path, content, name)
        if images is None:
            continue
        labels = yolo_label_folder(images)
        if labels is not None and labels.is_dir():
            found[name] = Layout("yolo_seg", root, images, path, labels)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden names, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _listing(folder: Path) -> str:
    names = [entry.name + ("/" if entry.is_dir() else "") for entry in _entries(folder)]
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return (", ".join(names[:LISTED_NAMES]) + more) or "nothing"
