"""Semantic maps: SPLIT/images/* with SPLIT/labels/*.png of the same name, and id2label.json beside the splits.

The pixel value of a label PNG is the label id (in a palette PNG the index, never the colour); `ignore_index` marks
pixels without a label.
"""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from hf_maskformer.data.dataset_index import files_fingerprint, indexed_dataset, path_image, readable_rows
from hf_maskformer.data.sample import check_image_size, make_segment
from hf_maskformer.model.image_conversion import UnreadableImageError
from hf_maskformer.model.label_spec import LabelSpec

READER_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
PNG_GREYSCALE = 0
PNG_BIT_DEPTH_BYTE, PNG_COLOUR_TYPE_BYTE = 24, 25  # in the IHDR chunk, which is always first

logger = logging.getLogger(__name__)


def load_semantic_maps(
    folder: Path,
    root: Path,
    ignore_index: int = 255,
    cache_dir: str | Path | None = None,
    on_bad_sample: str = "raise",
) -> tuple[Dataset, LabelSpec]:
    """Reads every label PNG of `folder` once and returns the rows and the labels.

    Args:
        folder: holds images/ and labels/.
        root: holds id2label.json. Without that file the labels are those found in all splits under it; they must then
            be 0..K-1 without a gap.
        ignore_index: pixel value without a label.
        cache_dir: where the rows are stored; None = the cache of `datasets`.
        on_bad_sample: "raise" for an unreadable file, or "skip": log it and leave the row out.

    Raises:
        ValueError: a missing partner, a value that is no label, sizes that differ, an unreadable file; the message
            names the files and the value.
    """
    names_file = root / "id2label.json"
    spec = read_id2label(names_file, ignore_index) if names_file.is_file() else None
    index = partial(_index, spec=spec, ignore_index=ignore_index, cache_dir=cache_dir, on_bad_sample=on_bad_sample)
    dataset = index(folder)
    if spec is None:
        spec = _infer_labels(folder, root, dataset, ignore_index, index)
    return dataset, spec


def read_id2label(path: Path, ignore_index: int) -> LabelSpec:
    """Labels of an id2label.json: {"0": "road", "1": "car"}."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(names, dict) or not all(key.isdigit() for key in names):
        raise ValueError(f'{path}: must be an object that names each label id, such as {{"0": "road", "1": "car"}}')
    try:
        return LabelSpec(id2label={int(key): str(name) for key, name in names.items()}, ignore_index=ignore_index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def pair_files(folder: Path) -> list[tuple[Path, Path]]:
    """(image, label) paths of one split, sorted by name; ValueError names those without a partner."""
    images, labels = _by_stem(folder / "images", IMAGE_SUFFIXES), _by_stem(folder / "labels", (".png",))
    for have, lack, kind, where in ((images, labels, "image", "labels"), (labels, images, "label", "images")):
        missing = [path.name for stem, path in have.items() if stem not in lack]
        if missing:
            raise ValueError(
                f"{len(missing)} {kind} file(s) of {folder} have no partner of the same name in {where}/: "
                + ", ".join(missing[:5])
                + (", ..." if len(missing) > 5 else "")
            )
    return [(images[stem], labels[stem]) for stem in images]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in suffixes:
            others.append(path.name)
        elif path.stem in files:
            raise ValueError(f"{folder} holds {files[path.stem].name} and {path.name}: one name, two files")
        else:
            files[path.stem] = path
    if not files:
        found = f"found {len(others)} other file(s) such as {others[0]}" if others else "it is empty"
        raise ValueError(f"{folder} holds no file that ends with {', '.join(suffixes)}; {found}")
    return files


def read_label_map(path: Path) -> np.ndarray:
    """(H, W) integer labels of a label PNG; ValueError names a file that is damaged or of a colour mode."""
    try:
        with PILImage.open(path) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{path}: cannot be read as an image, it is damaged or cut off ({error})"
        ) from error
    if mode not in LABEL_MODES:
        raise ValueError(
            f"{path}: label map of mode {mode} ({values.shape[-1]} channels); colours do not say which label "
            f"is meant. Write one channel with the label ids (modes {', '.join(LABEL_MODES[:5])})"
        )
    if mode == "L":
        return values // _grey_step(path)
    return values.astype(np.uint8) if mode == "1" else values


def _grey_step(path: Path) -> int:
    """PIL stretches the values of 2 and 4-bit greyscale PNG to 0..255; this is the factor to take out again."""
    with path.open("rb") as file:
        header = file.read(PNG_COLOUR_TYPE_BYTE + 1)
    if header[:4] != b"\x89PNG" or header[PNG_COLOUR_TYPE_BYTE] != PNG_GREYSCALE:
        return 1
    return {2: 85, 4: 17}.get(header[PNG_BIT_DEPTH_BYTE], 1)


def _index(
    folder: Path, spec: LabelSpec | None, ignore_index: int, cache_dir: str | Path | None, on_bad_sample: str
) -> Dataset:
    pairs = pair_files(folder)
    labels = None if spec is None else spec.to_dict()
    options = {"ignore_index": ignore_index, "labels": labels, "on_bad_sample": on_bad_sample}
    fingerprint = files_fingerprint(
        "semantic_maps", READER_VERSION, options, [path for pair in pairs for path in pair]
    )

    def rows() -> Iterator[dict[str, Any]]:
        return readable_rows(pairs, lambda pair: _row(*pair, folder, spec, ignore_index), on_bad_sample, where=folder)

    return indexed_dataset(rows, fingerprint, cache_dir)


def _row(image: Path, label: Path, folder: Path, spec: LabelSpec | None, ignore_index: int) -> dict[str, Any]:
    labels = read_label_map(label)
    height, width = labels.shape
    check_image_size(image, (height, width), str(label))
    if spec is not None:
        spec.check_semantic_map(labels, str(label))
    labels = np.asfortranarray(labels)  # run-length codes go down the columns
    found = np.flatnonzero(np.bincount(labels.reshape(-1, order="F")))
    return {
        "image": path_image(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "file_name": image.relative_to(folder.parent).as_posix(),
        "segments": [
            make_segment(int(value) + 1, int(value), labels == value)  # segment id 0 would be void
            for value in found
            if value != ignore_index
        ],
    }


def _infer_labels(
    folder: Path, root: Path, dataset: Dataset, ignore_index: int, index: Callable[[Path], Dataset]
) -> LabelSpec:
    """Labels found in all splits, so that train and val agree on their number."""
    others = [path.parent for path in sorted(root.glob("*/labels")) if path.parent.resolve() != folder.resolve()]
    found: set[int] = set()
    for rows in [dataset, *map(index, others)]:
        for segments in rows.with_format(None)["segments"]:
            found.update(segment["label_id"] for segment in segments)
    values = sorted(found)
    if values != list(range(len(values))) or not values:
        hint = "; they look 1-based: subtract 1" if values and values[0] == 1 else ""
        raise ValueError(
            f"{root} has no id2label.json and the labels found, {values[:20]}, are not 0..K-1 without a gap{hint}. "
            f'Write {root / "id2label.json"} ({{"0": "name", ...}}) or choose ignore_index (now {ignore_index})'
        )
    logger.warning("%s has no id2label.json: labels 0..%d are taken from the label maps", root, len(values) - 1)
    return LabelSpec(id2label={value: f"label_{value}" for value in values}, ignore_index=ignore_index)
