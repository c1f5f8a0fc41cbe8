"""Finds the images of a folder and the file that belongs to each."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.semantic_maps import IMAGE_SUFFIXES


def image_files(folder: Path, problems: Problems, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """The files of a folder with one of the suffixes, by name without suffix, in the order of the names.

    Files of other suffixes and folders with files are reported as a warning, hidden ones are passed over. Of two files
    of one name the second is a problem.

    Raises:
        DatasetError: there is no such file; in every mode.
    """
    entries, folders = list_folder(folder)
    files = files_by_name(entries, suffixes, problems)
    others = [path for path in entries if path.suffix.lower() not in suffixes]
    if not files:
        found = f"found {len(others)} other file(s) such as {others[0].name}" if others else "it is empty"
        if folders and not others:
            found = f"found only folders such as {folders[0].name}"
        message = f"{folder} holds no file that ends with {', '.join(suffixes)}; {found}"
        raise DatasetError("missing_file", folder, message)
    for path in others:
        problems.warning("unlisted_file", path, f"{path}: is no image and is not used")
    warn_folders(folders, problems)
    return files


def _stem(path: Path) -> str:
    return path.stem


def files_by_name(
    entries: Iterable[Path], suffixes: tuple[str, ...], problems: Problems, name_of: Callable[[Path], str] = _stem
) -> dict[str, Path]:
    """The files of one folder that have one of the suffixes, upper or lower case, by name.

    The name is the file's without suffix, or what `name_of` gives. Of two files of one name the second is a problem.
    """
    files: dict[str, Path] = {}
    for path in entries:
        if path.suffix.lower() not in suffixes:
            continue
        with problems.catch(path):
            name = name_of(path)
            if name in files:
                message = f"{path.parent} holds {files[name].name} and {path.name}: one name, two files"
                raise DatasetError("duplicate", path, message)
            files[name] = path
    return files


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files, folders) in a folder, sorted, without hidden names; a link counts as what it leads to."""
    if not folder.is_dir():
        return [], []
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    files, folders = ([folder / name for name, is_dir in found if is_dir == wanted] for wanted in (False, True))
    return files, folders


def warn_folders(folders: Iterable[Path], problems: Problems) -> None:
    """A warning for each folder that holds files, however deep, where none is read."""
    for path in folders:
        count = count_files(path)
        if count:
            message = f"{path}: folders are not looked into here, its {count} file(s) are not used"
            problems.warning("unlisted_file", path, message)


def count_files(folder: Path) -> int:
    """Number of the files in a folder and the folders below it, without hidden names."""
    return sum(not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def report_missing(missing: Iterable[Path], what: str, problems: Problems) -> None:
    """A problem for each file that lacks its partner; `what` says which."""
    for path in missing:
        with problems.catch(path):
            raise DatasetError("missing_file", path, f"{path}: has no {what}")


def image_name(image: Path, parts: int = 3) -> str:
    """The `file_name` of an image: the last parts of its path, as in images/SPLIT/NAME."""
    return Path(*image.absolute().parts[-parts:]).as_posix()
