"""Text files that belong to a dataset: lists of classes, and the label files of YOLO."""

from pathlib import Path

from hf_maskformer.data.problems import DatasetError


def read_lines(path: Path, kind: str = "unreadable_file") -> list[str]:
    """The lines of a UTF-8 file, with or without a byte order mark.

    Raises:
        DatasetError: of `kind`, for another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        message = f"{path}: is no UTF-8 text, save it as UTF-8 ({error})"
        raise DatasetError(kind, path, message) from error
