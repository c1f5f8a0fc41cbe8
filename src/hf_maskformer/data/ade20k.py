"""ADE20K in the form of its scene parsing benchmark (ADEChallengeData2016): 150 classes, one label PNG for each image.

Format: Zhou et al., "Scene Parsing through ADE20K Dataset" (CVPR 2017). In annotations/SPLIT/*.png 0 is void and
1..150 are the classes, which become the labels 0..149; objectInfo150.txt beside the splits names them.
sceneCategories.txt is not used.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.label_files import read_label_map
from hf_maskformer.data.paired_files import image_files, image_name, report_missing
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import check_image_size
from hf_maskformer.data.text_files import read_lines
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_runs, id_map_to_runs

READER_VERSION = 1
NAMES_FILE = "objectInfo150.txt"
NUM_CLASSES = 150
RAW_VOID, VOID = 0, 255


def ade20k_label_spec(root: Path, problems: Problems) -> LabelSpec:
    """Labels 0..149 for the raw values 1..150.

    A class is called by the first of its names in objectInfo150.txt, or by all of them where another class has the
    same first one. Without that file they are label_1..label_150, after their raw values, and a warning says so.
    """
    path = root / NAMES_FILE
    names = [f"label_{raw}" for raw in range(1, NUM_CLASSES + 1)]
    if path.is_file():
        with problems.catch(path):
            names = _read_names(path)
    else:
        message = (
            f"{path}: no such file; the folder is read as ADE20K, in which 0 is void, and its classes are called "
            f"label_1..label_{NUM_CLASSES}"
        )
        problems.warning("missing_file", path, message)
    raw_to_label = {RAW_VOID: VOID} | {raw: raw - 1 for raw in range(1, len(names) + 1)}
    return LabelSpec(dict(enumerate(names)), ignore_index=VOID, raw_to_label=raw_to_label)


def _read_names(path: Path) -> list[str]:
    header, *lines = read_lines(path, "broken_record") or [""]
    columns = [cell.strip() for cell in header.split("\t")]
    if not {"Idx", "Name"} <= set(columns):
        message = f"{path}: must have the columns Idx and Name, separated by tabs; found {', '.join(columns)}"
        raise DatasetError("broken_record", path, message)
    synonyms = []
    for number, line in enumerate(lines, start=1):
        record = dict(zip(columns, (cell.strip() for cell in line.split("\t")), strict=False))
        if record.get("Idx") != str(number) or not record.get("Name"):
            message = f"{path}: line {number + 1} must have Idx {number} and a Name, found {line!r}"
            raise DatasetError("broken_record", path, message)
        synonyms.append([name.strip() for name in record["Name"].split(",")])
    if len(synonyms) != NUM_CLASSES:
        message = f"{path}: names {len(synonyms)} classes, ADE20K has {NUM_CLASSES}"
        raise DatasetError("broken_record", path, message)
    counts = Counter(names[0] for names in synonyms)
    return [names[0] if counts[names[0]] == 1 else ", ".join(names) for names in synonyms]


def ade20k_source(images: Path, maps: Path, root: Path, problems: Problems) -> DatasetSource:
    """Opens one split; each class of an image is one segment whose id is the raw value.

    Args:
        images: images/training or images/validation.
        maps: annotations/training or annotations/validation.
        root: holds objectInfo150.txt.
        problems: is told of a missing partner, a value above 150, sizes that differ, and files that cannot be read.

    Raises:
        DatasetError: a folder without files, or an objectInfo150.txt that cannot be read.
    """
    spec = ade20k_label_spec(root, problems)
    files = image_files(images, problems)
    labels = image_files(maps, problems, (".png",))
    pairs = [(path, labels[name]) for name, path in files.items() if name in labels]
    options = {"labels": spec.to_dict()}
    fingerprint = files_fingerprint("ade20k", READER_VERSION, options, [*files.values(), *labels.values()])

    def rows() -> Iterator[dict[str, Any]]:
        report_missing((path for name, path in files.items() if name not in labels), f"PNG in {maps}", problems)
        report_missing((path for name, path in labels.items() if name not in files), f"image in {images}", problems)
        yield from readable_rows(pairs, partial(_row, spec, problems), problems, where=images)

    return DatasetSource(spec, rows, fingerprint)


def _row(spec: LabelSpec, problems: Problems, pair: tuple[Path, Path]) -> dict[str, Any]:
    image, label = pair
    with problem_kind("broken_mask", label):
        values = read_label_map(label)
    with problem_kind("size_mismatch", image):
        check_image_size(image, values.shape, str(label))
    wanted = []
    for value in np.unique(id_map_runs(values)[0]).tolist():
        with problems.catch(label):
            if value > spec.num_labels:
                message = f"{label}: value {value} is no ADE20K label, allowed: 0 (void) and 1..{spec.num_labels}"
                raise DatasetError("unknown_label", label, message)
            if value != RAW_VOID:
                wanted.append(value)
    return {
        "image": path_image(image),
        "image_id": image.stem,
        "height": values.shape[0],
        "width": values.shape[1],
        "file_name": image_name(image),
        "segments": runs_to_segments(id_map_to_runs(values, wanted), wanted, [value - 1 for value in wanted]),
    }
