"""Maps of object ids for tests: what is in a row, files that PIL does not write, and Cellpose's names of files."""

import struct
from pathlib import Path

import numpy as np

from hf_maskformer.model.masks import decode_rle

IMAGE, MAP = "train/images/a.png", "train/instance_maps/a.png"  # in `id_map_folder`


def masks_of(row: dict) -> dict[int, np.ndarray]:
    """The (H, W) mask of each segment by its id."""
    size = [row["height"], row["width"]]
    return {segment["id"]: decode_rle({"size": size, "counts": segment["rle"]}) for segment in row["segments"]}


def check_masks(row: dict, ids: np.ndarray) -> None:
    """The segments are the values of the map, without 0, and nothing else."""
    masks = masks_of(row)
    assert list(masks) == [value for value in np.unique(ids).tolist() if value]
    for value, mask in masks.items():
        np.testing.assert_array_equal(mask, ids == value)


def write_tiff(path: Path, values: np.ndarray) -> None:
    """An uncompressed TIFF of one strip, of types that PIL does not write: the bits and the kind of the array."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    content = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [
        *((256, width), (257, height), (258, values.dtype.itemsize * 8), (259, 1), (262, 1)),
        *((273, 8), (277, 1), (278, height), (279, len(content)), (339, kind)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    path.write_bytes(header + content + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


def as_cellpose(root: Path, image_ending: str = "_img", map_ending: str = "_masks") -> Path:
    """SPLIT/images/NAME and SPLIT/instance_maps/NAME become two files of the folder SPLIT."""
    for part, ending in (("images", image_ending), ("instance_maps", map_ending)):
        for file in sorted(root.glob(f"*/{part}/*")):
            file.rename(file.parents[1] / f"{file.stem}{ending}{file.suffix}")
        for folder in root.glob(f"*/{part}"):
            folder.rmdir()
    return root
