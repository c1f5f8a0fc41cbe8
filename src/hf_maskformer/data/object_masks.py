"""One mask file for each object: folders of masks that may overlap, with or without folders for the classes.

Two shapes are read:
- SPLIT/NAME/images/*.png with SPLIT/NAME/masks/[CLASS/]*.png, the shape of the 2018 Data Science Bowl (Caicedo et al.,
  "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl", Nature Methods 2019);
- SPLIT/images/NAME.* with SPLIT/masks/NAME/[CLASS/]*.png.
Masks may also be BMP or TIFF files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.label_files import LABEL_SUFFIXES
from hf_maskformer.data.paired_files import (
    count_files,
    image_files,
    image_name,
    list_folder,
    report_missing,
    warn_folders,
)
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.sample import image_size, make_segment
from hf_maskformer.data.segments import warn_identical
from hf_maskformer.data.semantic_maps import IMAGE_SUFFIXES
from hf_maskformer.model.label_spec import LabelSpec

READER_VERSION = 2
MASK_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "RGB", "RGBA")
VALUES_SHOWN = 5


@dataclass(frozen=True)
class MaskedImage:
    """An image and the masks of its objects, each a (class folder or None, file)."""

    image: Path
    masks: tuple[tuple[str | None, Path], ...]


def object_masks_source(
    images: Path,
    masks: Path | None,
    problems: Problems,
    folders: Sequence[tuple[Path, Path | None]] = (),
    class_name: str = "object",
) -> DatasetSource:
    """Opens one split. A segment is a mask; its id is its place among the sorted files of the image, from 1.

    A pixel is inside where its colour is not black (also of a palette PNG); a mask may have one such colour only.
    Every class is a thing, no segment is a crowd. A mask without a pixel is left out with a warning; equal masks of
    one class are kept with a warning.

    Args:
        images: folder of the images; with `masks` None, of one folder for each image with images/ and masks/ in it.
        masks: holds a folder of masks for each image.
        problems: is told of an image without masks and the reverse, a folder of which no file is a mask, a mask of
            another size, with several values or outside the class folders, and of files that cannot be read.
        folders: (images, masks) of all splits. The classes are the class folders found there, sorted by name.
        class_name: the only class, where there are no class folders.

    Raises:
        DatasetError: there are no images.
    """
    items = _items(images, masks, problems)
    if not items:
        raise DatasetError("missing_file", images, f"{images} holds no image with masks")
    classes = _classes(items, [pair for pair in folders if pair != (images, masks)])
    names = classes or [class_name]
    spec = LabelSpec(dict(enumerate(names)), thing_label_ids=tuple(range(len(names))))
    files = [file for item in items for file in (item.image, *(mask for _, mask in item.masks))]
    fingerprint = files_fingerprint("object_masks", READER_VERSION, {"labels": spec.to_dict()}, files)
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)} if classes else {None: 0}

    def rows() -> Iterator[dict[str, Any]]:
        yield from readable_rows(items, partial(_row, label_of, images, problems), problems, where=images)

    return DatasetSource(spec, rows, fingerprint)


# --- files -----------------------------------------------------------------------------------------------------------


def _items(images: Path, masks: Path | None, problems: Problems) -> list[MaskedImage]:
    """The images that have a folder of masks; the others are reported."""
    if masks is None:
        return _image_folders(images, problems)
    files = image_files(images, problems)
    loose, inside = list_folder(masks)
    folders = {path.name: path for path in inside}
    missing = (path for name, path in files.items() if name not in folders)
    report_missing(missing, f"folder of its name in {masks} (an image without objects has an empty one)", problems)
    report_missing((path for name, path in folders.items() if name not in files), f"image in {images}", problems)
    _warn_loose(loose, problems)
    items = []
    for name, path in files.items():
        if name in folders:
            with problems.catch(folders[name]):
                items.append(MaskedImage(path, _mask_files(folders[name], problems)))
    return items


def _image_folders(folder: Path, problems: Problems) -> list[MaskedImage]:
    """NAME/images/* with NAME/masks/*."""
    items = []
    loose, folders = list_folder(folder)
    _warn_loose([path for path in loose if path.suffix.lower() in IMAGE_SUFFIXES], problems)
    for path in folders:
        with problems.catch(path):
            if not (path / "images").is_dir() or not (path / "masks").is_dir():
                raise DatasetError("missing_file", path, f"{path}: must hold the folders images/ and masks/")
            files = list(image_files(path / "images", problems).values())
            if len(files) > 1:
                names = ", ".join(file.name for file in files[:VALUES_SHOWN])
                raise DatasetError(
                    "duplicate", path, f"{path}/images holds {len(files)} images, allowed is 1: {names}"
                )
            items.append(MaskedImage(files[0], _mask_files(path / "masks", problems)))
    return items


def _warn_loose(files: list[Path], problems: Problems) -> None:
    for path in files:
        problems.warning("unlisted_file", path, f"{path}: lies in no folder of an image and is not used")


def _mask_files(folder: Path, problems: Problems) -> tuple[tuple[str | None, Path], ...]:
    """(class folder or None, file) of each mask, sorted; other files are reported.

    Raises:
        DatasetError: there are files, but none is a mask: the image would seem to have no objects.
    """
    files, class_folders = list_folder(folder)
    found: list[tuple[str | None, Path]] = [(None, path) for path in files]
    deeper: list[Path] = []
    for class_folder in class_folders:
        inside, below = list_folder(class_folder)
        found += [(class_folder.name, path) for path in inside]
        deeper += below
    masks = [(name, path) for name, path in found if _is_mask(path)]
    unused = sum(map(count_files, deeper)) + len(found) - len(masks)
    if unused and not masks:
        message = (
            f"{folder}: none of its {unused} file(s) is a mask, [CLASS/]NAME with one of {', '.join(LABEL_SUFFIXES)}; "
            "the folder of an image without objects must be empty"
        )
        raise DatasetError("missing_file", folder, message)
    for _, path in found:
        if not _is_mask(path):
            message = f"{path}: does not end with one of {', '.join(LABEL_SUFFIXES)} and is not used"
            problems.warning("unlisted_file", path, message)
    warn_folders(deeper, problems)
    return tuple(sorted(masks, key=lambda mask: mask[1]))


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in LABEL_SUFFIXES


def _classes(items: list[MaskedImage], others: list[tuple[Path, Path | None]]) -> list[str]:
    """Names of the class folders of all splits, sorted; none if the masks lie directly in the image's folder."""
    found = {name for item in items for name, _ in item.masks}
    for images, masks in others:
        for folder in list_folder(masks if masks is not None else images)[1]:
            inside = folder if masks is not None else folder / "masks"
            class_folders = list_folder(inside)[1]
            found.update(path.name for path in class_folders if any(map(_is_mask, list_folder(path)[0])))
    return sorted(name for name in found if name is not None)


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(
    label_of: dict[str | None, int], images: Path, problems: Problems, item: MaskedImage
) -> dict[str, Any] | None:
    """None where unreadable files are left out and one of the masks is: the image would lack an object."""
    with problem_kind("unreadable_file", item.image):
        size = image_size(item.image)
    segments, read = [], 0
    for number, (class_folder, file) in enumerate(item.masks, start=1):
        with problems.catch(file, "broken_mask"):
            label_id = _label_id(label_of, class_folder, file)
            mask = _read_mask(file)
            read += 1
            _check_size(mask, file, item.image, size)
            if not mask.any():
                problems.warning("empty_mask", file, f"{file}: has no pixel inside and is not used")
                continue
            segments.append(make_segment(number, label_id, np.asfortranarray(mask)))
    if problems.mode == "skip" and read < len(item.masks):
        return None
    named = [{**segment, "id": _mask_name(*item.masks[segment["id"] - 1])} for segment in segments]
    warn_identical(item.image, "its masks", named, problems)
    return {
        "image": path_image(item.image),
        "image_id": item.image.stem,
        "height": size[0],
        "width": size[1],
        "file_name": image_name(item.image, 3 if item.image.parent == images else 4),
        "segments": segments,
    }


def _mask_name(class_folder: str | None, file: Path) -> str:
    return file.name if class_folder is None else f"{class_folder}/{file.name}"


def _label_id(label_of: dict[str | None, int], class_folder: str | None, file: Path) -> int:
    if class_folder in label_of:
        return label_of[class_folder]
    classes = ", ".join(str(name) for name in label_of)
    message = f"{file}: lies in no class folder, but other masks do; folders that exist: {classes}"
    raise DatasetError("unknown_label", file, message)


def _check_size(mask: np.ndarray, file: Path, image: Path, size: tuple[int, int]) -> None:
    if mask.shape != size:
        height, width = mask.shape
        message = f"{file} is {width}x{height} (width x height), but its image {image} is {size[1]}x{size[0]}"
        raise DatasetError("size_mismatch", file, message)


def _read_mask(file: Path) -> np.ndarray:
    """(H, W) bool, True where the colour is not black; the alpha channel decides where there is one colour only."""
    values = _read_values(file)
    if values.ndim == 3:
        has_alpha = values.shape[-1] % 2 == 0  # LA, RGBA
        colours, alpha = (values[..., :-1] if has_alpha else values), values[..., -1]
        one_colour = (colours == colours[:1, :1]).all()
        values = alpha if has_alpha and one_colour and alpha.min() != alpha.max() else _packed(colours)
    inside = values != 0
    found = values[inside]
    if len(found) and (found != found[0]).any():
        shown = np.unique(found)[: VALUES_SHOWN + 1].tolist()
        listed = ", ".join(map(str, shown[:VALUES_SHOWN])) + (", ..." if len(shown) > VALUES_SHOWN else "")
        message = f"{file}: a mask may have one value besides 0, this one has {listed}"
        raise DatasetError("broken_mask", file, message)
    return inside


def _read_values(file: Path) -> np.ndarray:
    """(H, W) or (H, W, C) integers; a palette is replaced by its colours."""
    try:
        with PILImage.open(file) as image:
            image.load()
            if image.mode == "P":
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        message = f"{file}: cannot be read as an image, it is damaged or cut off ({error})"
        raise DatasetError("unreadable_file", file, message) from error
    if mode not in MASK_MODES:
        raise DatasetError("broken_mask", file, f"{file}: is of mode {mode}, allowed: {', '.join(MASK_MODES)} and P")
    return values


def _packed(colours: np.ndarray) -> np.ndarray:
    """(H, W) one number for each colour of (H, W, C), 0 for black."""
    weights = 256 ** np.arange(colours.shape[-1], dtype=np.int64)
    return colours.astype(np.int64) @ weights
