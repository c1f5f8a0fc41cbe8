"""Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with the label PNGs of gtFine/SPLIT/CITY.

Format: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (CVPR 2016). The table of labels
is that of the dataset's own tools (cityscapesScripts, helpers/labels.py); panoptic truth is derived as they do it
(preparation/createPanopticImgs.py).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.label_files import read_label_map
from hf_maskformer.data.paired_files import list_folder, report_missing, warn_folders
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import check_image_size
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_runs, id_map_to_runs

READER_VERSION = 1
IMAGE_ENDING = "_leftImg8bit.png"
# Endings of label PNGs, the one with most truth first.
INSTANCE_IDS, LABEL_IDS, TRAIN_IDS = "_gtFine_instanceIds.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
INSTANCE_FACTOR = 1000  # an instance has the value class * 1000 + number, a class without instances its own id
VOID = 255


class CityscapesLabel(NamedTuple):
    """One line of the official table; `train_id` is the label in training, `VOID` where it is not evaluated."""

    name: str
    id: int
    train_id: int
    is_thing: bool


# cityscapesScripts, helpers/labels.py, without "license plate" (id -1), which is never drawn.
CITYSCAPES_LABELS = (
    CityscapesLabel("unlabeled", 0, VOID, False),
    CityscapesLabel("ego vehicle", 1, VOID, False),
    CityscapesLabel("rectification border", 2, VOID, False),
    CityscapesLabel("out of roi", 3, VOID, False),
    CityscapesLabel("static", 4, VOID, False),
    CityscapesLabel("dynamic", 5, VOID, False),
    CityscapesLabel("ground", 6, VOID, False),
    CityscapesLabel("road", 7, 0, False),
    CityscapesLabel("sidewalk", 8, 1, False),
    CityscapesLabel("parking", 9, VOID, False),
    CityscapesLabel("rail track", 10, VOID, False),
    CityscapesLabel("building", 11, 2, False),
    CityscapesLabel("wall", 12, 3, False),
    CityscapesLabel("fence", 13, 4, False),
    CityscapesLabel("guard rail", 14, VOID, False),
    CityscapesLabel("bridge", 15, VOID, False),
    CityscapesLabel("tunnel", 16, VOID, False),
    CityscapesLabel("pole", 17, 5, False),
    CityscapesLabel("polegroup", 18, VOID, False),
    CityscapesLabel("traffic light", 19, 6, False),
    CityscapesLabel("traffic sign", 20, 7, False),
    CityscapesLabel("vegetation", 21, 8, False),
    CityscapesLabel("terrain", 22, 9, False),
    CityscapesLabel("sky", 23, 10, False),
    CityscapesLabel("person", 24, 11, True),
    CityscapesLabel("rider", 25, 12, True),
    CityscapesLabel("car", 26, 13, True),
    CityscapesLabel("truck", 27, 14, True),
    CityscapesLabel("bus", 28, 15, True),
    CityscapesLabel("caravan", 29, VOID, True),
    CityscapesLabel("trailer", 30, VOID, True),
    CityscapesLabel("train", 31, 16, True),
    CityscapesLabel("motorcycle", 32, 17, True),
    CityscapesLabel("bicycle", 33, 18, True),
)
BY_ID = {label.id: label for label in CITYSCAPES_LABELS}


def cityscapes_label_spec() -> LabelSpec:
    """The 19 evaluated classes by their train ids; the raw values are the ids of the official table."""
    used = sorted((label for label in CITYSCAPES_LABELS if label.train_id != VOID), key=lambda label: label.train_id)
    return LabelSpec(
        id2label={label.train_id: label.name for label in used},
        thing_label_ids=tuple(label.train_id for label in used if label.is_thing),
        ignore_index=VOID,
        raw_to_label={label.id: label.train_id for label in CITYSCAPES_LABELS},
    )


def cityscapes_source(images: Path, maps: Path, problems: Problems) -> DatasetSource:
    """Opens one split.

    From *_gtFine_instanceIds.png each value is one segment with that id: a thing with its number, a class without
    numbers, or as a crowd the things of one class that are not told apart. Where the split has none of these files,
    *_gtFine_labelIds.png or *_gtFine_labelTrainIds.png give one segment for each class. What is not evaluated is void.

    Args:
        images: leftImg8bit/SPLIT.
        maps: gtFine/SPLIT.
        problems: is told of a missing partner, a value that is not in the official table, sizes that differ,
            files that cannot be read, and what else lies among the images.

    Raises:
        DatasetError: the split has no images, no labels, or labels that are all void (as the test split).
    """
    files = _image_files(images, problems)
    if not files:
        raise DatasetError("missing_file", images, f"{images} holds no CITY/*{IMAGE_ENDING}")
    ending = _label_ending(images, maps)
    labels = {_key(path, ending): path for path in sorted(maps.glob(f"*/*{ending}"))}
    by_key = {_key(path, IMAGE_ENDING): path for path in files}
    spec = cityscapes_label_spec()
    pairs = [(path, labels[key]) for key, path in by_key.items() if key in labels]
    fingerprint = files_fingerprint(
        "cityscapes", READER_VERSION, {"ending": ending}, [*by_key.values(), *labels.values()]
    )

    def rows() -> Iterator[dict[str, Any]]:
        report_missing((path for key, path in by_key.items() if key not in labels), f"*{ending} in {maps}", problems)
        report_missing((path for key, path in labels.items() if key not in by_key), f"image in {images}", problems)
        any_segment = False
        for row in readable_rows(pairs, partial(_row, ending, spec, images, problems), problems, where=images):
            any_segment |= bool(row["segments"])
            yield row
        with problems.catch(maps):
            if not any_segment:
                raise _no_labels(maps, f"the {len(pairs)} files *{ending} hold no evaluated class")

    return DatasetSource(spec, rows, fingerprint)


def _image_files(images: Path, problems: Problems) -> list[Path]:
    """CITY/*_leftImg8bit.png, sorted; what else lies there is reported."""
    others, cities = list_folder(images)
    found = []
    for city in cities:
        files, folders = list_folder(city)
        found += [path for path in files if path.name.endswith(IMAGE_ENDING)]
        others += [path for path in files if not path.name.endswith(IMAGE_ENDING)]
        warn_folders(folders, problems)
    for path in others:
        problems.warning("unlisted_file", path, f"{path}: is no CITY/*{IMAGE_ENDING} and is not used")
    return found


def _label_ending(images: Path, maps: Path) -> str:
    for ending in (INSTANCE_IDS, LABEL_IDS, TRAIN_IDS):
        if next(maps.glob(f"*/*{ending}"), None) is not None:
            return ending
    raise _no_labels(maps, f"no file CITY/*{INSTANCE_IDS}, *{LABEL_IDS} or *{TRAIN_IDS} for the images of {images}")


def _no_labels(maps: Path, found: str) -> DatasetError:
    hint = "; the labels of Cityscapes' test images are not public, choose train or val" if maps.name == "test" else ""
    return DatasetError("missing_file", maps, f"{maps} has no labels: {found}{hint}")


def _key(path: Path, ending: str) -> str:
    """CITY/CITY_000000_000019, the same for an image and its labels."""
    return f"{path.parent.name}/{path.name.removesuffix(ending)}"


def _row(ending: str, spec: LabelSpec, images: Path, problems: Problems, pair: tuple[Path, Path]) -> dict[str, Any]:
    image, label = pair
    with problem_kind("broken_mask", label):
        values = read_label_map(label)
    with problem_kind("size_mismatch", image):
        check_image_size(image, values.shape, str(label))
    height, width = values.shape
    return {
        "image": path_image(image),
        "image_id": image.name.removesuffix(IMAGE_ENDING),
        "height": height,
        "width": width,
        "file_name": image.relative_to(images.parents[1]).as_posix(),
        "segments": _segments(values, label, ending, spec, problems),
    }


def _segments(
    values: np.ndarray, file: Path, ending: str, spec: LabelSpec, problems: Problems
) -> list[dict[str, Any]]:
    wanted: list[int] = []
    label_ids: list[int] = []
    crowds: list[bool] = []
    for value in np.unique(id_map_runs(values)[0]).tolist():
        with problems.catch(file):
            label_id, iscrowd = _meaning(value, file, ending, spec)
            if label_id != spec.ignore_index:
                wanted.append(value)
                label_ids.append(label_id)
                crowds.append(iscrowd)
    # Train id 0 is road, but segment id 0 would be void.
    ids = [value + 1 for value in wanted] if ending == TRAIN_IDS else wanted
    return runs_to_segments(id_map_to_runs(values, wanted), ids, label_ids, crowds)


def _meaning(value: int, file: Path, ending: str, spec: LabelSpec) -> tuple[int, bool]:
    """(label id or `ignore_index`, whether it is a crowd) of a pixel value."""
    if ending == TRAIN_IDS:
        if value != VOID and value not in spec.id2label:
            raise _unknown(file, value, f"allowed: the train ids 0..{spec.num_labels - 1} and {VOID} for void")
        return value, False
    is_instance = value >= INSTANCE_FACTOR
    label = BY_ID.get(value // INSTANCE_FACTOR if is_instance else value)
    if label is None or (is_instance and ending == LABEL_IDS):
        numbered = f" and class * {INSTANCE_FACTOR} + number for things" if ending == INSTANCE_IDS else ""
        raise _unknown(file, value, f"allowed: the ids {min(BY_ID)}..{max(BY_ID)}{numbered}")
    if is_instance and not label.is_thing:
        raise _unknown(file, value, f"class {label.id} ({label.name}) has no instances")
    return label.train_id, ending == INSTANCE_IDS and label.is_thing and not is_instance


def _unknown(file: Path, value: int, allowed: str) -> DatasetError:
    return DatasetError("unknown_label", file, f"{file}: value {value} is no Cityscapes label; {allowed}")
