"""One map for each image whose pixels are ids of objects, all of one class; 0 lies outside of objects.

Two shapes are read:
- images/NAME.* with a map of the same name in another folder, as StarDist's data have it (Schmidt et al., "Cell
  Detection with Star-convex Polygons", MICCAI 2018);
- NAME_img.* or NAME.* with NAME_masks.* or NAME_cp_masks.* in one folder, as Cellpose has it (Stringer et al.,
  "Cellpose: a generalist algorithm for cellular segmentation", Nature Methods 2021).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.label_files import (
    LABEL_MODES,
    LABEL_SUFFIXES,
    LOSSY_SUFFIXES,
    label_values,
    lossy_error,
    open_label_file,
)
from hf_maskformer.data.paired_files import (
    files_by_name,
    image_files,
    image_name,
    list_folder,
    report_missing,
    warn_folders,
)
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import check_image_size
from hf_maskformer.data.semantic_maps import IMAGE_SUFFIXES
from hf_maskformer.model.image_conversion import UnreadableImageError
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_to_runs

READER_VERSION = 1
MAP_SUFFIXES = (*LABEL_SUFFIXES, *LOSSY_SUFFIXES)  # lossy maps are found, so that they can be refused by name
# How names without suffix end in a folder of images and maps.
IMAGE_ENDING = "_img"
MAP_ENDINGS = ("_cp_masks", "_masks")
OTHER_ENDINGS = ("_flows", "_cp_output", "_outlines", "_dP")  # pictures that Cellpose writes beside its masks
TIFF_SUFFIXES = (".tif", ".tiff")
WHITE = 255


def instance_maps_source(
    images: Path, maps: Path | None, problems: Problems, class_name: str = "object"
) -> DatasetSource:
    """Opens one split. The id of a segment is its value in the map; pieces that do not touch are one object.

    A map has one channel of whole numbers from 0; in a palette PNG the index counts. A map of zeros belongs to an
    image without objects. The class is a thing, no segment is a crowd.

    Args:
        images: folder of the images.
        maps: folder of the maps; None = they lie among the images, told apart by the ends of their names.
        problems: is told of an image without a map and the reverse, two files of one name, a map of another size, with
            colours, fractions or values below 0, in a lossy file, and of files that cannot be read. It is warned of
            files that are not used, and of maps that hold nothing but one object 255.
        class_name: of the objects.

    Raises:
        DatasetError: there are no images with a map.
    """
    pairs = _pairs(images, maps, problems)
    if not pairs:
        raise DatasetError("missing_file", images, f"{images} holds no image with a map of its objects")
    spec = LabelSpec({0: class_name}, thing_label_ids=(0,))
    files = [file for pair in pairs for file in pair]
    fingerprint = files_fingerprint("instance_maps", READER_VERSION, {"labels": spec.to_dict()}, files)
    make_row = partial(_row, 2 if maps is None else 3)

    def rows() -> Iterator[dict[str, Any]]:
        found: set[tuple[int, ...]] = set()  # the ids of each map that has one object or none
        several = False
        for row in readable_rows(pairs, make_row, problems, where=images):
            several = several or len(row["segments"]) > 1
            if not several:
                found.add(tuple(segment["id"] for segment in row["segments"]))
            yield row
        if not several and found - {()} == {(WHITE,)}:
            _warn_white(maps or images, problems)

    return DatasetSource(spec, rows, fingerprint)


def has_named_maps(names: Iterable[str]) -> bool:
    """Whether the files of a folder are images and maps, by their names: at least one image has its map."""
    names = list(names)
    if not any("_masks." in name for name in names):  # the folders of most data sets, which may be very large
        return False
    paths = [Path(name) for name in names]
    maps = {_pair_name(path) for path in paths if _is_named_map(path)}
    images = (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(MAP_ENDINGS))
    return any(_pair_name(path) in maps for path in images)


# --- files -----------------------------------------------------------------------------------------------------------


def _pairs(images: Path, maps: Path | None, problems: Problems) -> list[tuple[Path, Path]]:
    """(image, map) of one name; what has no partner or a map that is lossy is reported."""
    if maps is None:
        image_of, map_of = _named_files(images, problems)
    else:
        image_of, map_of = image_files(images, problems), image_files(maps, problems, MAP_SUFFIXES)
    where = maps or images
    missing = (path for name, path in image_of.items() if name not in map_of)
    report_missing(missing, f"map in {where} (an image without objects has one that is 0 everywhere)", problems)
    report_missing((path for name, path in map_of.items() if name not in image_of), f"image in {images}", problems)
    pairs = []
    for name, image in image_of.items():
        if name not in map_of:
            continue
        with problems.catch(map_of[name]):
            if map_of[name].suffix.lower() in LOSSY_SUFFIXES:
                raise lossy_error(map_of[name])
            pairs.append((image, map_of[name]))
    return pairs


def _named_files(folder: Path, problems: Problems) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and maps of one folder, by the name that they share; warns of the other files."""
    files, folders = list_folder(folder)
    map_of = files_by_name(filter(_is_named_map, files), MAP_SUFFIXES, problems, _pair_name)
    pictures: list[Path] = []
    for path in files:
        if _is_named_map(path):
            continue
        # An image may end as a by-product does, but then it has a map.
        by_product = path.stem.endswith((*MAP_ENDINGS, *OTHER_ENDINGS)) and _pair_name(path) not in map_of
        if path.suffix.lower() in IMAGE_SUFFIXES and not by_product:
            pictures.append(path)
            continue
        problems.warning(
            "unlisted_file", path, f"{path}: is neither an image nor a map of its objects and is not used"
        )
    warn_folders(folders, problems)
    return files_by_name(pictures, IMAGE_SUFFIXES, problems, _pair_name), map_of


def _is_named_map(path: Path) -> bool:
    return path.stem.endswith(MAP_ENDINGS) and path.suffix.lower() in MAP_SUFFIXES


def _pair_name(path: Path) -> str:
    """What the names of an image and of its map have in common: a for a.png, a_img.png, a_masks.png, a_cp_masks.png.

    Cellpose writes the masks of a_img.png as a_img_cp_masks.png.
    """
    name = path.stem
    ending = next((ending for ending in MAP_ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending).removesuffix(IMAGE_ENDING)


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(name_parts: int, pair: tuple[Path, Path]) -> dict[str, Any]:
    image, file = pair
    with problem_kind("unreadable_file", file):
        ids = _read_ids(file)
    with problem_kind("size_mismatch", image):
        check_image_size(image, ids.shape, str(file))
    values = np.unique(ids)
    if values[0] < 0:
        message = f"{file}: holds the value {values[0]}, which is no id: those are 0 (no object) to {2**31 - 1}"
        raise DatasetError("broken_mask", file, message)
    objects = values[values > 0].astype(np.int64)
    return {
        "image": path_image(image),
        "image_id": image.stem,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "file_name": image_name(image, name_parts),
        "segments": runs_to_segments(id_map_to_runs(ids, objects), objects.tolist(), [0] * len(objects)),
    }


def _read_ids(file: Path) -> np.ndarray:
    """(H, W) integers of a map."""
    try:
        image = open_label_file(file)
    except UnreadableImageError as error:
        if file.suffix.lower() not in TIFF_SUFFIXES:
            raise
        # Numpy's own integers have 64 bits, so such files are common; PIL only says that it does not know them.
        message = f"{error}; a TIFF of 64-bit numbers cannot be read: save ids with 16 or 32 bits"
        raise UnreadableImageError(message) from error
    if image.mode == "F":
        return _whole_numbers(np.asarray(image), file)
    if image.mode not in LABEL_MODES:
        message = (
            f"{file}: is of mode {image.mode} ({len(image.getbands())} channels); a map of ids has one channel "
            f"(modes {', '.join(LABEL_MODES[:5])})"
        )
        raise DatasetError("broken_mask", file, message)
    return label_values(image, file)


def _whole_numbers(values: np.ndarray, file: Path) -> np.ndarray:
    """(H, W) int64 of floats that are whole; some tools write every array as floats."""
    broken = values[~np.isfinite(values) | (values != np.floor(values))]
    if len(broken):
        message = f"{file}: holds the value {broken[0]}, ids of objects are whole numbers"
        raise DatasetError("broken_mask", file, message)
    return values.astype(np.int64)


def _warn_white(where: Path, problems: Problems) -> None:
    message = (
        f"{where}: no map holds more than one object, and that has the value {WHITE}; they look like black and white "
        "masks, in which all objects of an image are one. Ids of objects differ; for masks of classes use "
        "format='semantic_maps'"
    )
    problems.warning("unknown_label", where, message)
