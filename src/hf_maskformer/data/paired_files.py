"""Finds the images of a folder and the file that belongs to each."""

from collections.abc import Iterable
from pathlib import Path

from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.semantic_maps import IMAGE_SUFFIXES


def image_files(folder: Path, problems: Problems, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """The files of a folder with one of the suffixes, by name without suffix, in the order of the names.

    Files of other suffixes are reported as a warning, hidden ones and folders are passed over. Of two files of one
    name the second is a problem.

    Raises:
        DatasetError: there is no such file; in every mode.
    """
    files: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in suffixes:
            others.append(path.name)
            continue
        with problems.catch(path):
            if path.stem in files:
                message = f"{folder} holds {files[path.stem].name} and {path.name}: one name, two files"
                raise DatasetError("duplicate", path, message)
            files[path.stem] = path
    if not files:
        found = f"found {len(others)} other file(s) such as {others[0]}" if others else "it is empty"
        message = f"{folder} holds no file that ends with {', '.join(suffixes)}; {found}"
        raise DatasetError("missing_file", folder, message)
    for name in others:
        problems.warning("unlisted_file", folder / name, f"{folder / name}: is no image and is not used")
    return files


def report_missing(missing: Iterable[Path], what: str, problems: Problems) -> None:
    """A problem for each file that lacks its partner; `what` says which."""
    for path in missing:
        with problems.catch(path):
            raise DatasetError("missing_file", path, f"{path}: has no {what}")
