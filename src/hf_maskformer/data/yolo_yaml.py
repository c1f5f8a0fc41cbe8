"""data.yaml of a YOLO dataset: the names of the classes, and where the splits lie."""

import os
from pathlib import Path
from typing import Any

import yaml

from hf_maskformer.data.problems import DatasetError

CLASS_NAMES_TEXT = "classes.txt"  # annotation tools write it beside the labels: one class name on each line
DATA_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


def yaml_images(path: Path, content: dict[str, Any], name: str) -> Path | None:
    """The folder of images that data.yaml gives a split: from its `path`, or from where the file lies."""
    value, base = content.get(name), content.get("path")
    if not isinstance(value, str):
        return None
    bases = [path.parent / str(base)] if base else []
    for folder in (*bases, path.parent):
        for inside in (value, value.removeprefix("../")):  # ../train/images is written for train/images beside it
            if (folder / inside).is_dir():
                return Path(os.path.normpath(folder / inside))
    return None


def yolo_label_folder(images: Path) -> Path | None:
    """The folder of text files to a folder of images: the last `images` of its path is `labels`."""
    parts = list(images.parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def find_data_yaml(*folders: Path) -> Path | None:
    files = (folder / name for folder in folders for name in DATA_YAML_NAMES)
    return next((file for file in files if file.is_file()), None)


def read_data_yaml(path: Path) -> dict[str, Any]:
    """The parsed file; DatasetError if it is no YAML or no object."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DatasetError("broken_record", path, f"{path}: is not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise DatasetError(
            "broken_record", path, f"{path}: must be an object with names and the folders of the splits"
        )
    return content
