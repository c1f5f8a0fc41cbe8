"""The annotations of a batch, in any of the forms that the image processor takes, as one list for each argument."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TargetInputs:
    """The annotations of a batch as the caller gave them, one entry per image in each list."""

    segmentation_maps: list[Any] | None
    annotations: list[Any] | None
    instance_id_to_semantic_id: list[Any] | None
    masks: list[Any] | None
    class_labels: list[Any] | None

    @classmethod
    def collect(
        cls,
        count: int,
        single: bool,
        segmentation_maps: Any = None,
        annotations: Any = None,
        instance_id_to_semantic_id: Any = None,
        masks: Any = None,
        class_labels: Any = None,
    ) -> "TargetInputs | None":
        """Bring the arguments of the processor to lists of `count` entries; None if there is no annotation.

        For a `single` image each argument may be given without a list around it.

        Raises:
            ValueError: the arguments contradict each other, or their number is not that of the images.
        """
        if (masks is None) != (class_labels is None):
            raise ValueError("masks and class_labels must be given together")
        if masks is not None and (segmentation_maps is not None or annotations is not None):
            raise ValueError("give either masks with class_labels, or segmentation_maps, or annotations")
        if instance_id_to_semantic_id is not None and (segmentation_maps is None or annotations is not None):
            raise ValueError("instance_id_to_semantic_id needs segmentation_maps of instance ids and no annotations")
        if segmentation_maps is None and annotations is None and masks is None:
            return None
        if isinstance(instance_id_to_semantic_id, Mapping):
            instance_id_to_semantic_id = [instance_id_to_semantic_id] * count
        if single:
            segmentation_maps = _wrap(segmentation_maps, not isinstance(segmentation_maps, (list, tuple)))
            annotations = _wrap(annotations, isinstance(annotations, Mapping))
            masks = _wrap(masks, _is_one_image(masks, mask_dimensions=2))
            class_labels = _wrap(class_labels, _is_one_image(class_labels, mask_dimensions=0))
        given = {
            "segmentation_maps": segmentation_maps,
            "annotations": annotations,
            "instance_id_to_semantic_id": instance_id_to_semantic_id,
            "masks": masks,
            "class_labels": class_labels,
        }
        for name, value in given.items():
            if value is not None and (isinstance(value, Mapping) or len(value) != count):
                raise ValueError(
                    f"{name} must be a list with one entry per image: {count} images, got {_length(value)}"
                )
        return cls(**{name: None if value is None else list(value) for name, value in given.items()})


def _wrap(value: Any, is_one_image: bool) -> Any:
    return [value] if value is not None and is_one_image else value


def _is_one_image(value: Any, mask_dimensions: int) -> bool:
    """True if the value describes one image (an array, or a list of RLE dicts or of items of so many dimensions)."""
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        return True
    return isinstance(value[0], Mapping) or getattr(value[0], "ndim", np.ndim(value[0])) == mask_dimensions


def _length(value: Any) -> str:
    return "a dict" if isinstance(value, Mapping) else f"{len(value)} entries"
