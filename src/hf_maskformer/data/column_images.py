"""Images in the cells of a `datasets` column: bytes or paths, read without the library's own decoding.

`datasets` would decode each image when its row is read, and raise an error that does not say which row it was.
"""

import io
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.label_files import grey_step
from hf_maskformer.data.problems import DatasetError
from hf_maskformer.data.sample import sides_are_swapped
from hf_maskformer.model.image_conversion import UnreadableImageError, check_channel_depth

READ_ERRORS = (OSError, SyntaxError, PILImage.DecompressionBombError)


def stored_image(cell: Any, where: str) -> dict[str, Any]:
    """The `image` of a row of `sample.FEATURES`: bytes, or the path of a file on this machine.

    Raises:
        DatasetError: the cell is empty, its file does not exist or cannot be fetched.
    """
    content, path = _parts(cell, where)
    if content is None and path is not None and "://" in path:
        content = _fetched(path, where)
    if content is not None:
        return {"bytes": content, "path": None if path is None else Path(path).name}
    assert path is not None
    if not Path(path).is_file():
        raise DatasetError("missing_file", path, f"{where}: its file {path} does not exist")
    return {"bytes": None, "path": str(Path(path).absolute())}


def image_name(cell: Any, default: str) -> str:
    """The file name that a cell gives for its image, or `default`."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return Path(path).name if isinstance(path, str) and path else default


def stored_size(image: dict[str, Any], where: str) -> tuple[int, int]:
    """(height, width) of a `stored_image` from its header, as turned by its EXIF orientation.

    Raises:
        DatasetError: it is no image, or one that `read_image` would refuse.
    """
    try:
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        with PILImage.open(io.BytesIO(content)) as opened:
            check_channel_depth(opened, where)
            width, height = opened.size
            turned = sides_are_swapped(opened, lambda: content)
    except UnreadableImageError as error:
        raise DatasetError("unreadable_file", where, str(error)) from error
    except READ_ERRORS as error:
        raise _unreadable(where, error) from error
    return (width, height) if turned else (height, width)


def stored_pixels(cell: Any, where: str) -> np.ndarray:
    """The pixels of a label image: (H, W) integers, or (H, W, 3) colours; of a palette image the indices.

    Raises:
        DatasetError: the cell is empty, or holds no image, or one of a mode that no label map has.
    """
    image = stored_image(cell, where)
    content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    try:
        with PILImage.open(io.BytesIO(content)) as opened:
            opened.load()
            mode, values = opened.mode, np.asarray(opened)
    except READ_ERRORS as error:
        raise _unreadable(where, error) from error
    if mode in ("RGB", "RGBA"):
        return values[..., :3]
    if mode == "1":
        return values.astype(np.uint8)
    if mode == "L":
        return values // grey_step(content)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise DatasetError(
            "unknown_label", where, f"{where}: a label image of mode {mode} holds no label ids; use one channel or RGB"
        )
    return values


def _parts(cell: Any, where: str) -> tuple[bytes | None, str | None]:
    content, path = None, None
    if isinstance(cell, dict):
        content, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, bytes):
        content = cell
    elif isinstance(cell, str):
        path = cell
    if content is None and not path:
        raise DatasetError("missing_file", where, f"{where}: holds no image")
    return content, path or None


def _fetched(path: str, where: str) -> bytes:
    """A remote file of streamed data."""
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise DatasetError("missing_file", path, f"{where}: its file {path} does not exist") from error
    except OSError as error:
        raise DatasetError("unreadable_file", path, f"{where}: {path} cannot be fetched ({error})") from error


def _unreadable(where: str, error: BaseException) -> DatasetError:
    message = f"{where}: cannot be read as an image, it is damaged or cut off ({error})"
    return DatasetError("unreadable_file", where, message)
