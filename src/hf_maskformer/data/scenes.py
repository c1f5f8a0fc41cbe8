"""The built-in scenes as a dataset: drawn on the fly, never stored, the same for the same (seed, split, index)."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.sample import Sample, group_by_task, make_segment
from hf_maskformer.data.scene_drawing import STUFF_NAMES, THING_NAMES, Scene, draw_scene
from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.label_spec import LabelSpec

# Each split draws from a stream of random numbers of its own, so no picture of one split is in another.
SPLIT_STREAMS = {"train": 0, "val": 1, "test": 2}
DEFAULT_LENGTHS = {"train": 1000, "val": 100, "test": 100}
SMALLEST_SIDE = 32


def scene_label_spec() -> LabelSpec:
    """Stuff sky, grass, water, sand; things balloon, crate, star."""
    names = [*STUFF_NAMES, *THING_NAMES]
    return LabelSpec(id2label=dict(enumerate(names)), thing_label_ids=tuple(range(len(STUFF_NAMES), len(names))))


class SceneRows:
    """A sequence of rows like those of `FEATURES`, made when they are asked for.

    Args:
        length: number of scenes.
        seed: first part of each scene's random state.
        stream: number of the split.
        image_size: (H, W), or one number for both.
        amodal: whether a thing's mask is its whole shape inside the picture instead of what is seen of it.
    """

    def __init__(
        self, length: int, seed: int, stream: int, image_size: tuple[int, int] | int, amodal: bool = False
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"image_size must be at least {SMALLEST_SIDE} on each side, got {(height, width)}")
        self.length = length
        self.seed = seed
        self.stream = stream
        self.size = (int(height), int(width))
        self.amodal = amodal

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        buffer = io.BytesIO()
        PILImage.fromarray(scene.image).save(buffer, format="PNG")
        name = self.name(index)
        return {
            "image": {"bytes": buffer.getvalue(), "path": None},
            "image_id": name,
            "height": self.size[0],
            "width": self.size[1],
            "file_name": f"{name}.png",
            "segments": [
                make_segment(number, int(label_id), mask)
                for number, (label_id, mask) in enumerate(
                    zip(scene.label_ids, self.masks(scene).dense(), strict=True), start=1
                )
            ],
        }

    def scene(self, index: int) -> Scene:
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return _draw_cached(self.seed, self.stream, index % self.length, self.size)

    def name(self, index: int) -> str:
        return f"scene-{self.seed}-{self.stream}-{index % self.length:06d}"

    def masks(self, scene: Scene) -> SegmentMasks:
        if self.amodal:
            return SegmentMasks.from_masks(scene.amodal_masks)
        return SegmentMasks.from_id_map(scene.segment_map, len(scene.label_ids))


@lru_cache(maxsize=2)
def _draw_cached(seed: int, stream: int, index: int, size: tuple[int, int]) -> Scene:
    """The last scenes are kept: a sample and its reference are asked for one after the other."""
    return draw_scene(np.random.default_rng([seed, stream, index]), *size)


class SceneData(SegmentationData):
    """`SegmentationData` of scenes: images and masks come straight from the drawing, without coding them first."""

    dataset: SceneRows

    def image(self, index: int) -> np.ndarray:
        return self.dataset.scene(index).image.copy()

    def sample(self, index: int) -> Sample:
        scene = self.dataset.scene(index)
        crowd = np.zeros(len(scene.label_ids), dtype=bool)
        _, targets, class_labels = group_by_task(scene.label_ids, crowd, self.task, self.label_spec)
        masks = self.dataset.masks(scene).group(targets, len(class_labels))
        name = self.dataset.name(index)
        return Sample(scene.image.copy(), masks, class_labels, image_id=name, file_name=f"{name}.png")


def load_scenes(
    split: str | None = "train",
    task: str = "panoptic",
    length: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | int = (128, 128),
    amodal: bool = False,
) -> SceneData:
    """The built-in scenes; `split` chooses a stream of pictures of its own."""
    split = split or "train"
    if split not in SPLIT_STREAMS:
        raise ValueError(f"scenes have no split {split!r}, allowed: {', '.join(SPLIT_STREAMS)}")
    if amodal and task == "panoptic":
        raise ValueError("amodal=True gives masks that overlap, which the panoptic task excludes; use task='instance'")
    length = DEFAULT_LENGTHS[split] if length is None else length
    rows = SceneRows(length, seed, SPLIT_STREAMS[split], image_size, amodal)
    return SceneData(rows, scene_label_spec(), task, "scenes", split)
