"""What the pixels of a label file hold: values, or label ids by value or by colour with a table."""

from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.label_table import LabelTable, colour_text
from hf_maskformer.data.problems import DatasetError
from hf_maskformer.model.image_conversion import UnreadableImageError, check_single_page

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
LOSSY_SUFFIXES = (".jpg", ".jpeg")  # these change values and colours
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
COLOUR_MODES = ("RGB", "RGBA", "P", "L", "1")
PNG_SIGNATURE = b"\x89PNG"
PNG_GREYSCALE = 0
PNG_BIT_DEPTH_BYTE, PNG_COLOUR_TYPE_BYTE = 24, 25  # in the IHDR chunk, which is always first
# PIL stretches the values of 2 and 4-bit greyscale PNG to 0..255: the factor to take out again.
GREY_STEPS = {2: 85, 4: 17}
LISTED_VALUES = 5


def read_label_map(path: Path) -> np.ndarray:
    """(H, W) integer values of a label file; ValueError names a file that is damaged or of a colour mode."""
    image = open_label_file(path)
    if image.mode not in LABEL_MODES:
        raise ValueError(
            f"{path}: label map of mode {image.mode} ({len(image.getbands())} channels); colours do not say which "
            f"label is meant. Give a label_table, or write one channel with the label ids "
            f"(modes {', '.join(LABEL_MODES[:5])})"
        )
    return label_values(image, path)


def label_values(image: PILImage.Image, path: Path) -> np.ndarray:
    """(H, W) integer values of an image of one of `LABEL_MODES` that was read from `path`."""
    values = np.asarray(image)
    if image.mode == "L":
        with path.open("rb") as file:
            step = grey_step(file.read(PNG_COLOUR_TYPE_BYTE + 1))
        return values // step if step > 1 else values
    return values.astype(np.uint8) if image.mode == "1" else values


def read_labels(path: Path, table: LabelTable) -> tuple[np.ndarray, dict[int, int]]:
    """(H, W) label ids of a label file, and the number of pixels of each value or colour that the table lacks.

    Unknown pixels hold the `ignore_index`. Only runs of equal pixels are looked up, so a large map costs little more
    than to open it.

    Raises:
        ValueError: the file is damaged or of a mode that the table does not fit.
    """
    values = _colour_codes(path) if table.is_colour else read_label_map(path)
    flat = values.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=len(flat))
    codes = flat[starts].astype(np.int64)
    if table.is_colour:
        codes = (codes & 255) << 16 | codes & 0xFF00 | codes >> 16 & 255  # the bytes of a pixel stand as R, G, B
    labels, known = table.labels_of(codes)
    unknown, place = np.unique(codes[~known], return_inverse=True)
    counts = np.bincount(place, weights=lengths[~known], minlength=len(unknown))
    spec = table.label_spec
    narrow = np.uint8 if max(spec.num_labels, spec.ignore_index) < 256 else np.int32
    dense = np.repeat(labels.astype(narrow), lengths).reshape(values.shape)
    return dense, dict(zip(unknown.tolist(), counts.astype(int).tolist(), strict=True))


def unknown_values(path: Path, table: LabelTable, unknown: dict[int, int]) -> DatasetError:
    """The error for values or colours that a table lacks, the most frequent first."""
    ordered = sorted(unknown, key=lambda value: -unknown[value])
    more = f" and {len(ordered) - LISTED_VALUES} more" if len(ordered) > LISTED_VALUES else ""
    if table.is_colour:
        shown = "; ".join(
            f"{colour_text(code)} of {unknown[code]} pixels, nearest is "
            f"{table.name_of(table.nearest_colour(code))!r} {colour_text(table.nearest_colour(code))}"
            for code in ordered[:LISTED_VALUES]
        )
        return DatasetError("unknown_label", path, f"{path}: colours that {table.source} does not have: {shown}{more}")
    shown = ", ".join(f"{value} ({unknown[value]} pixels)" for value in ordered[:LISTED_VALUES])
    assert table.label_spec.raw_to_label is not None
    known = ", ".join(map(str, sorted(table.label_spec.raw_to_label)))
    message = f"{path}: values that {table.source} does not have: {shown}{more}; known: {known}"
    return DatasetError("unknown_label", path, message)


def lossy_error(path: Path) -> DatasetError:
    """The error for a label file with one of `LOSSY_SUFFIXES`."""
    message = (
        f"{path}: {path.suffix} files change the values of pixels, so a label map in one cannot be read "
        f"exactly; allowed: {', '.join(LABEL_SUFFIXES)}"
    )
    return DatasetError("unknown_label", path, message)


def open_label_file(path: Path) -> PILImage.Image:
    """The decoded image of a label file, as it is stored: its EXIF rotation is not applied.

    Raises:
        UnreadableImageError: it is no image, is cut off or holds several pages.
    """
    try:
        with PILImage.open(path) as image:
            check_single_page(image, str(path))
            image.load()
            return image
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{path}: cannot be read as an image, it is damaged or cut off ({error})"
        ) from error


def _colour_codes(path: Path) -> np.ndarray:
    """(H, W) uint32 with the bytes of each pixel's red, green and blue, and a fourth that means nothing."""
    image = open_label_file(path)
    if image.mode not in COLOUR_MODES:
        raise ValueError(f"{path}: label map of mode {image.mode}; colours need one of {', '.join(COLOUR_MODES)}")
    if image.mode not in ("RGB", "RGBA"):
        image = image.convert("RGB")
    pixels = np.ascontiguousarray(image if image.mode == "RGBA" else image.convert("RGBX"))
    return pixels.view("<u4")[..., 0]


def grey_step(content: bytes) -> int:
    """By how much PIL has multiplied the values of a greyscale image, from the beginning of its file."""
    header = content[: PNG_COLOUR_TYPE_BYTE + 1]
    if len(header) <= PNG_COLOUR_TYPE_BYTE or not header.startswith(PNG_SIGNATURE):
        return 1
    return GREY_STEPS.get(header[PNG_BIT_DEPTH_BYTE], 1) if header[PNG_COLOUR_TYPE_BYTE] == PNG_GREYSCALE else 1
