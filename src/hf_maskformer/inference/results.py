"""What a `Predictor` found in one image: the id map, its segments, pictures and files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_maskformer.model.masks import decode_rle, ids_to_panoptic_png
from hf_maskformer.visualize import AnyImage, draw_segments, fill_segments

MAX_LABEL_ID_8BIT = 254  # 255 is the void value of an 8-bit label image
VOID_8BIT, VOID_16BIT = 255, 65535


@dataclass(frozen=True)
class SegmentationResult:
    """One image's result.

    Attributes:
        segmentation: (H, W) int32 segment ids at the size of the image; 0 is void.
        segments: dicts with `id` (from 1), `label_id`, `label` (its name), `score` (0..1 or None), `rle` (COCO, of the
            whole segment: instances may overlap in it), `area` (pixels of the rle) and `bbox` ([x, y, width, height]).
        task: "semantic" (one segment per class present), "instance" or "panoptic".
        id2label: names of all classes of the model.
        image: (H, W, 3) uint8, the image as it was read.
        name: file name without its ending, or "image-0001" and so on for an image that came without a file.
        file_name: path of the file as it was given; None for an image that came without one.
    """

    segmentation: np.ndarray
    segments: list[dict[str, Any]]
    task: str
    id2label: Mapping[int, str]
    image: np.ndarray
    name: str
    file_name: str | None = None

    def semantic_map(self, void: int = -1) -> np.ndarray:
        """(H, W) int32 label ids, `void` where there is no segment."""
        ids = [segment["id"] for segment in self.segments]
        labels = np.array([segment["label_id"] for segment in self.segments], dtype=np.int32)
        return fill_segments(self.segmentation, ids, labels, void)

    def mask(self, segment_id: int) -> np.ndarray:
        """(H, W) bool mask of the whole segment, also where another instance lies on top of it."""
        for segment in self.segments:
            if segment["id"] == segment_id:
                return decode_rle(segment["rle"])
        raise ValueError(f"segment_id must be one of {[s['id'] for s in self.segments]}, got {segment_id}")

    def overlay(self, image: AnyImage | None = None, legend: bool = False, **options: Any) -> Image.Image:
        """The image (default: the one predicted on) with the segments drawn over it.

        `options` are those of `hf_maskformer.visualize.draw_segments`. A semantic result is coloured by class, the
        others by segment.
        """
        options.setdefault("color_by", "label" if self.task == "semantic" else "segment")
        picture = self.image if image is None else image
        return draw_segments(picture, self.segmentation, self.segments, self.id2label, legend=legend, **options)

    def save(self, directory: str | Path, stem: str | None = None) -> list[Path]:
        """Writes the result and returns the files' paths.

        - `STEM_overlay.png`: the picture with its legend;
        - `STEM_labels.png` (semantic): grey values are label ids, 255 is void (16 bit and 65535 when there are more
          than 255 classes); or `STEM_panoptic.png` (instance, panoptic): COCO's coding, id = R + 256 G + 65536 B;
        - `STEM_segments.json`: the stem as `name`, the image's path, size, task and all segments with their COCO RLE.

        Args:
            directory: created where it does not exist; files of the same name are replaced.
            stem: beginning of the file names; default: the result's name.
        """
        folder, stem = Path(directory), stem or self.name
        folder.mkdir(parents=True, exist_ok=True)
        overlay = folder / f"{stem}_overlay.png"
        self.overlay(legend=True).save(overlay)
        if self.task == "semantic":
            id_map = folder / f"{stem}_labels.png"
            Image.fromarray(self._label_image()).save(id_map)
        else:
            id_map = folder / f"{stem}_panoptic.png"
            Image.fromarray(ids_to_panoptic_png(self.segmentation)).save(id_map)
        segments = folder / f"{stem}_segments.json"
        description = {**self.to_dict(), "name": stem}
        segments.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        return [overlay, id_map, segments]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description without pixels other than the RLE."""
        height, width = self.segmentation.shape
        return {
            "name": self.name,
            "file_name": self.file_name,
            "task": self.task,
            "height": height,
            "width": width,
            "segments": self.segments,
        }

    def _label_image(self) -> np.ndarray:
        """(H, W) uint8, or uint16 where the label ids do not fit."""
        if max(self.id2label, default=0) <= MAX_LABEL_ID_8BIT:
            return self.semantic_map(VOID_8BIT).astype(np.uint8)
        return self.semantic_map(VOID_16BIT).astype(np.uint16)
