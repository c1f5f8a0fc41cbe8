"""One PNG for each object: folders of masks that may overlap, with or without folders for the classes.

Two shapes are read:
- SPLIT/NAME/images/*.png with SPLIT/NAME/masks/[CLASS/]*.png, the shape of the 2018 Data Science Bowl (Caicedo et al.,
  "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl", Nature Methods 2019);
- SPLIT/images/NAME.* with SPLIT/masks/NAME/[CLASS/]*.png.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.paired_files import image_files, report_missing
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.sample import image_size, make_segment
from hf_maskformer.model.label_spec import LabelSpec

READER_VERSION = 1
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
        problems: is told of an image without masks and the reverse, a mask of another size, with several values or
            outside the class folders, and of files that cannot be read.
        folders: (images, masks) of all splits. The classes are the class folders found there, sorted by name.
        class_name: the only class, where there are no class folders.

    Raises:
        DatasetError: there are no images.
    """
    items = list(_items(images, masks, problems))
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


def _items(images: Path, masks: Path | None, problems: Problems) -> Iterator[MaskedImage]:
    """The images that have a folder of masks; the others are reported."""
    if masks is None:
        yield from _image_folders(images, problems)
        return
    files = image_files(images, problems)
    folders = {path.name: path for path in _folders(masks)}
    missing = (path for name, path in files.items() if name not in folders)
    report_missing(missing, f"folder of its name in {masks} (an image without objects has an empty one)", problems)
    report_missing((path for name, path in folders.items() if name not in files), f"image in {images}", problems)
    for path in sorted(masks.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            problems.warning("unlisted_file", path, f"{path}: lies in no folder of an image and is not used")
    for name, path in files.items():
        if name in folders:
            yield MaskedImage(path, tuple(_mask_files(folders[name], problems)))


def _image_folders(folder: Path, problems: Problems) -> list[MaskedImage]:
    """NAME/images/* with NAME/masks/*."""
    items = []
    for path in _folders(folder):
        with problems.catch(path):
            if not (path / "images").is_dir() or not (path / "masks").is_dir():
                raise DatasetError("missing_file", path, f"{path}: must hold the folders images/ and masks/")
            files = list(image_files(path / "images", problems).values())
            if len(files) > 1:
                names = ", ".join(file.name for file in files[:VALUES_SHOWN])
                raise DatasetError(
                    "duplicate", path, f"{path}/images holds {len(files)} images, allowed is 1: {names}"
                )
            items.append(MaskedImage(files[0], tuple(_mask_files(path / "masks", problems))))
    return items


def _mask_files(folder: Path, problems: Problems) -> Iterator[tuple[str | None, Path]]:
    """(class folder or None, file) of each mask, sorted; what is no PNG is reported."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_dir() or any(part.startswith(".") for part in inside):
            continue
        if path.suffix.lower() != ".png" or len(inside) > 2:
            problems.warning("unlisted_file", path, f"{path}: is no PNG in [CLASS/] of {folder} and is not used")
            continue
        yield (inside[0] if len(inside) == 2 else None), path


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(items: list[MaskedImage], others: list[tuple[Path, Path | None]]) -> list[str]:
    """Names of the class folders of all splits, sorted; none if the masks lie directly in the image's folder."""
    found = {name for item in items for name, _ in item.masks}
    for images, masks in others:
        for folder in _folders(masks if masks is not None else images):
            inside = folder if masks is not None else folder / "masks"
            found.update(path.name for path in _folders(inside) if any(path.glob("*.png")))
    return sorted(name for name in found if name is not None)


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(
    label_of: dict[str | None, int], images: Path, problems: Problems, item: MaskedImage
) -> dict[str, Any] | None:
    """None where unreadable files are left out and one of the masks is: the image would lack an object."""
    root = images.parent if item.image.parent != images else images.parents[1]
    with problem_kind("unreadable_file", item.image):
        size = image_size(item.image)
    segments, read = [], 0
    first_files: dict[tuple[int, str], Path] = {}
    for number, (class_folder, file) in enumerate(item.masks, start=1):
        with problems.catch(file, "broken_mask"):
            label_id = _label_id(label_of, class_folder, file)
            mask = _read_mask(file)
            read += 1
            _check_size(mask, file, item.image, size)
            if not mask.any():
                problems.warning("empty_mask", file, f"{file}: has no pixel inside and is not used")
                continue
            segment = make_segment(number, label_id, np.asfortranarray(mask))
            segments.append(segment)
            first = first_files.setdefault((label_id, segment["rle"]), file)
            if first != file:
                problems.warning("duplicate", file, f"{file}: the same class and mask as {first.name}")
    if problems.mode == "skip" and read < len(item.masks):
        return None
    return {
        "image": path_image(item.image),
        "image_id": item.image.stem,
        "height": size[0],
        "width": size[1],
        "file_name": item.image.relative_to(root).as_posix(),
        "segments": segments,
    }


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
