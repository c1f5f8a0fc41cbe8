"""Writes what panopticapi reads from the two images of coco_panoptic_sample to fixtures/panoptic_reader.json.

    PYTHONPATH=tests python -m data.record_panoptic_reader --panopticapi DIR --data DATA

DIR is a clone of cocodataset/panopticapi, DATA the folder with coco_panoptic_sample. The lines that read are those of
its evaluation.py (`pq_compute_single_core`): the PNG as uint32, its own `rgb2id`, and a count of each id that
segments_info describes. The hash of its utils.py says which version it was.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.metric_cases import digest

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "panoptic_reader.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panopticapi", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    clone = arguments.panopticapi.resolve()
    sys.path.insert(0, str(clone))
    from panopticapi.utils import rgb2id

    folder = arguments.data / "coco_panoptic_sample"
    images = {}
    for annotation in json.loads((folder / "panoptic_examples.json").read_text())["annotations"]:
        path = folder / "panoptic_examples" / annotation["file_name"]
        ids = rgb2id(np.array(Image.open(path), dtype=np.uint32))
        described = {info["id"] for info in annotation["segments_info"]}
        values, counts = (column.tolist() for column in np.unique(ids, return_counts=True))
        areas = {value: count for value, count in zip(values, counts, strict=True) if value in described}
        void = ids.size - sum(areas.values())
        images[annotation["file_name"]] = {"id_map": digest(ids), "void": void, "areas": areas}
    source = hashlib.sha256((clone / "panopticapi" / "utils.py").read_bytes()).hexdigest()
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps({"peer": "panopticapi", "utils.py": source, "images": images}, indent=1) + "\n")


if __name__ == "__main__":
    main()
