"""Evaluation images beside their truth and their prediction, as one PNG: what a run has learned, at a glance."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import decode_rles
from hf_maskformer.visualize import contact_sheet, draw_segments

Segmentation = tuple[np.ndarray, list[dict[str, Any]]]


def spread_indices(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over `range(length)`."""
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(min(count, length))]


def semantic_segments(label_map: np.ndarray, ignore_index: int) -> Segmentation:
    """A semantic map (H, W) as ids (label + 1, void 0) and one segment per class present."""
    ids = np.where(label_map == ignore_index, 0, label_map + 1).astype(np.int32)
    present = [int(i) for i in np.unique(ids) if i > 0]
    return ids, [{"id": i, "label_id": i - 1} for i in present]


def reference_segments(reference: Any, task: str, spec: LabelSpec, size: tuple[int, int]) -> Segmentation:
    """What `SegmentationData.reference` gives for `task` and an image of `size` (H, W), as id map and segments."""
    if task == "semantic":
        return semantic_segments(np.asarray(reference), spec.ignore_index)
    if task == "panoptic":
        segments = [
            {"id": s["id"], "label_id": s["label_id"] if "label_id" in s else s["category_id"]}
            for s in reference["segments_info"]
        ]
        return np.asarray(reference["segmentation"]), segments
    masks = decode_rles(reference["masks"], size)  # (N, H, W)
    ids = np.zeros(size, dtype=np.int32)
    for index in np.argsort(-masks.sum(axis=(1, 2)), kind="stable"):  # where masks overlap the smaller one is seen
        ids[masks[index]] = index + 1
    return ids, [{"id": number, "label_id": int(label)} for number, label in enumerate(reference["labels"], start=1)]


def predicted_segments(
    processor: Any, outputs: Any, task: str, size: tuple[int, int], spec: LabelSpec
) -> Segmentation:
    """The processor's post-processing of one image's outputs at `size` (H, W)."""
    if task == "semantic":
        label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
        return semantic_segments(label_map.cpu().numpy(), spec.ignore_index)
    method = getattr(processor, f"post_process_{task}_segmentation")
    result = method(outputs, target_sizes=[size])[0]
    return result["segmentation"].cpu().numpy(), result["segments_info"]


def sample_sheet(
    model: Any,
    processor: Any,
    data: Any,
    indices: Iterable[int],
    device: torch.device | str,
    on_bad_sample: str = "raise",
) -> Image.Image | None:
    """One row per image: image, truth, prediction. The model is left in the mode it was in.

    With `on_bad_sample` "skip" an image that cannot be read has no row; None if no image can be read.
    """
    spec = data.label_spec
    was_training = model.training
    model.eval()
    panels = []
    for index in indices:
        try:
            image = data.image(index)
        except ValueError:
            if on_bad_sample == "raise":
                raise
            continue
        inputs = processor(images=[image], return_tensors="pt").to(device)
        with torch.inference_mode():
            outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        truth = reference_segments(data.reference(index), data.task, spec, image.shape[:2])
        predicted = predicted_segments(processor, outputs, data.task, image.shape[:2], spec)
        panels.append(Image.fromarray(image))
        for ids, segments in (truth, predicted):  # a class has one colour, so that truth and prediction compare
            panels.append(draw_segments(image, ids, segments, spec.id2label, color_by="label"))
    model.train(was_training)
    if not panels:
        return None
    return contact_sheet(panels, columns=3, titles=["image", "truth", "prediction"] * (len(panels) // 3))
