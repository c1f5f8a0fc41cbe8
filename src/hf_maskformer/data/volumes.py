"""Volumes: SPLIT/images/*.nii.gz with SPLIT/labels/*.nii.gz of the same name, and id2label.json beside the splits.

NIfTI stores the axes as (x, y, z); here a volume is (D, H, W) = (z, y, x), and so is its spacing in millimetres. This
file reads what `inspect_dataset` reports; volumes are not trained on yet.
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.label_table import check_ignore_index
from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.semantic_maps import read_id2label
from hf_maskformer.model.label_spec import LabelSpec

VOLUME_SUFFIXES = (".nii.gz", ".nii")
AFFINE_TOLERANCE = 1e-3  # millimetres; headers keep 32-bit floats
BLACK_WHITE_PERCENTILES = (0.5, 99.5)  # of a slice, for its picture


@dataclass(frozen=True)
class Volume:
    """`values` (D, H, W), `spacing` (D, H, W) in millimetres, `affine` (4, 4) from voxels to millimetres."""

    values: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray


@dataclass(frozen=True)
class VolumeItem:
    """What is counted of one image and its label.

    Attributes:
        image, label: the two files.
        size: (D, H, W).
        spacing: (D, H, W) in millimetres.
        labels: (N,) label ids that occur, ascending.
        voxels: (N,) how often.
        void_voxels: number of voxels of `ignore_index`.
        content: hash of the image's voxels.
    """

    image: Path
    label: Path
    size: tuple[int, int, int]
    spacing: tuple[float, ...]
    labels: np.ndarray
    voxels: np.ndarray
    void_voxels: int
    content: str

    @property
    def commonest(self) -> int | None:
        """The label with most voxels; None where all are void."""
        return int(self.labels[np.argmax(self.voxels)]) if len(self.labels) else None


def volumes_spec(labels: Path, root: Path, problems: Problems, ignore_index: int = 255) -> LabelSpec:
    """Labels of id2label.json; without that file those found in the folder `labels`, with a warning."""
    require_nibabel()
    check_ignore_index(ignore_index)
    names_file = root / "id2label.json"
    if names_file.is_file():
        return read_id2label(names_file, ignore_index)
    largest = 0
    unread = Problems("list")  # what is wrong with a file is reported when its pair is read
    for file in _by_name(labels, unread).values():
        with unread.catch(file):
            values = label_values(read_volume(file).values, file)
            largest = max(largest, int(values[values != ignore_index].max(initial=0)))
    problems.warning(
        "missing_file", names_file, f"{names_file} does not exist: labels 0..{largest} are taken from the volumes"
    )
    return LabelSpec({label: f"label_{label}" for label in range(largest + 1)}, ignore_index=ignore_index)


def volumes_items(images: Path, labels: Path, spec: LabelSpec, problems: Problems) -> Iterator[VolumeItem]:
    """Reads every pair of a split, one at a time; a pair with an error is reported and left out."""
    files, truths = _by_name(images, problems), _by_name(labels, problems)
    for have, lack, where in ((files, truths, labels), (truths, files, images)):
        for name in sorted(set(have) - set(lack)):
            with problems.catch(have[name]):
                raise DatasetError("missing_file", have[name], f"{have[name]} has no partner of its name in {where}")
    for name in sorted(set(files) & set(truths)):
        with problems.catch(truths[name]):
            yield _item(files[name], truths[name], spec, problems)


def read_volume(path: Path) -> Volume:
    """One NIfTI file with three axes (a fourth of length 1 is dropped).

    Raises:
        DatasetError: it cannot be read ("unreadable_file") or has other axes ("size_mismatch").
        ValueError: nibabel is not installed.
    """
    nibabel = require_nibabel()
    # What nibabel and the decompression raise for headers and contents that are damaged.
    damage = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, zlib.error)
    try:
        file = nibabel.load(path)
        values = np.asanyarray(file.dataobj)
        affine, zooms = np.asarray(file.affine, dtype=np.float64), file.header.get_zooms()
    except (*damage, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            "unreadable_file", path, f"{path}: cannot be read as NIfTI, it is damaged or cut off ({reason})"
        ) from error
    if values.dtype.kind not in "iufb":
        raise DatasetError("unreadable_file", path, f"{path}: voxels are of type {values.dtype}, they must be numbers")
    shape = values.shape
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3 or values.size == 0:
        raise DatasetError("size_mismatch", path, f"{path}: a volume must have 3 axes, this one has shape {shape}")
    return Volume(values.transpose(), tuple(float(zoom) for zoom in zooms[2::-1]), affine)


def label_values(values: np.ndarray, path: Path) -> np.ndarray:
    """The different values of a label volume, ascending int64; DatasetError for those that are no whole numbers."""
    found = np.unique(values)
    broken = found[~np.isfinite(found) | (found != np.round(found))]
    if broken.size:
        shown = ", ".join(f"{value:g}" for value in broken[:5].tolist())
        raise DatasetError("unknown_label", path, f"{path}: label values must be whole numbers, found {shown}")
    return found.astype(np.int64)


def label_slice(item: VolumeItem) -> tuple[np.ndarray, np.ndarray]:
    """The slice to look at, that with most voxels beside the commonest label: ((H, W) uint8 grey, (H, W) labels)."""
    labels = read_volume(item.label).values.astype(np.int64)
    number = int(np.argmax((labels != (item.commonest or 0)).sum(axis=(1, 2))))
    plane = read_volume(item.image).values[number].astype(np.float64)
    black, white = np.percentile(plane, BLACK_WHITE_PERCENTILES)
    grey = (plane - black) / max(white - black, np.finfo(np.float64).tiny)
    return (grey.clip(0, 1) * 255).round().astype(np.uint8), labels[number]


def _by_name(folder: Path, problems: Problems) -> dict[str, Path]:
    """The NIfTI files of a folder by their name without ending; others are reported."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = next((suffix for suffix in VOLUME_SUFFIXES if path.name.lower().endswith(suffix)), None)
        if path.name.startswith("."):
            continue
        if suffix is None:
            problems.warning("unlisted_file", path, f"{path}: does not end with {' or '.join(VOLUME_SUFFIXES)}")
            continue
        name = path.name[: -len(suffix)]
        with problems.catch(path):
            if name in files:
                raise DatasetError("duplicate", path, f"{folder} holds {files[name].name} and {path.name}: one name")
            files[name] = path
    return files


def _item(image: Path, label: Path, spec: LabelSpec, problems: Problems) -> VolumeItem:
    volume, truth = read_volume(image), read_volume(label)
    size, truth_size = volume.values.shape, truth.values.shape
    if size != truth_size:
        raise DatasetError("size_mismatch", label, f"{label} has size {truth_size} (D, H, W), {image} has {size}")
    if not np.allclose(volume.affine, truth.affine, atol=AFFINE_TOLERANCE):
        raise DatasetError(
            "size_mismatch",
            label,
            f"{label} lies elsewhere than {image}: spacing {_rounded(truth.spacing)} and {_rounded(volume.spacing)} "
            f"mm, origin {_rounded(truth.affine[:3, 3])} and {_rounded(volume.affine[:3, 3])} mm",
        )
    broken = int(volume.values.size - np.isfinite(volume.values).sum())
    if broken:
        raise DatasetError("unreadable_file", image, f"{image}: {broken} voxels are nan or infinite")
    values, counts = label_values(truth.values, label), np.unique(truth.values, return_counts=True)[1]
    unknown = [value for value in values.tolist() if value not in spec.id2label and value != spec.ignore_index]
    if unknown:
        raise DatasetError(
            "unknown_label",
            label,
            f"{label}: label {', '.join(map(str, unknown[:5]))} is not in id2label, allowed: "
            f"0..{spec.num_labels - 1} or {spec.ignore_index}",
        )
    if len(values) == 1:
        problems.warning("empty_mask", label, f"{label}: every voxel is {values[0]}, nothing is segmented")
    known = values != spec.ignore_index
    content = hashlib.blake2b(np.ascontiguousarray(volume.values).data, key=str(size).encode(), digest_size=16)
    return VolumeItem(
        image,
        label,
        size,
        volume.spacing,
        values[known],
        counts[known],
        int(counts[~known].sum()),
        content.hexdigest(),
    )


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(value), 3) for value in values)


def require_nibabel() -> Any:
    """The package that reads NIfTI; ValueError says how to install it."""
    try:
        import nibabel
    except ImportError as error:
        raise ValueError("reading .nii.gz volumes needs nibabel: pip install hf_maskformer[volumes]") from error
    return nibabel
