"""From images to segments in one call: read, process, run the model, post-process."""

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.sample import image_to_rgb, read_image
from hf_maskformer.inference.checkpoint import check_agreement, load_checkpoint
from hf_maskformer.inference.frames import AnyInput, UniqueNames, frames_of
from hf_maskformer.inference.overlap import overlapped
from hf_maskformer.inference.results import SegmentationResult
from hf_maskformer.model.image_conversion import runs_of_one_canvas
from hf_maskformer.model.masks import encode_rle, rle_area, rle_bbox
from hf_maskformer.model.postprocess import logits_per_image, semantic_scores
from hf_maskformer.model.processor_settings import check_merge
from hf_maskformer.model.resampling import resize_maps

logger = logging.getLogger(__name__)

TASKS = ("semantic", "instance", "panoptic")
SCORE_DECIMALS = 6


@dataclass
class _Batch:
    """A few images on their way."""

    sources: list[tuple[int, AnyInput]]  # with their position
    names: list[str]
    images: list[np.ndarray] = field(default_factory=list)  # (H, W, 3) uint8
    # What the processor made of them, then what the model made of that: one for each run of images of one canvas.
    tensors: list[Any] = field(default_factory=list)


class Predictor:
    """Segments images with a trained model.

    Args:
        model: a directory, a Hub id, an ONNX file of `hf-maskformer export` (which onnxruntime runs on the CPU), or a
            loaded `HfMaskFormerForUniversalSegmentation` (then `processor` is needed).
        task: "semantic", "instance" or "panoptic"; default: the one stored with the model.
        device: where the model runs; default: a GPU if there is one.
        processor: the image processor of a model that is already loaded; it is not changed.
        threshold, mask_threshold, overlap_mask_area_threshold: replace the stored ones, 0..1; the last for things and
            stuff.
        merge: how masks become panoptic segments, "argmax" or "mask_wise"; default: the one stored with the model.
        batch_size: images in one forward pass.
        intensity_range: values that become black and white, for images of more than 8 bits, which are refused without;
            default: the one stored with the model.

    Raises:
        ValueError: `model` cannot be loaded, is of another type, or disagrees with its image processor on task,
            labels or thing classes; an argument is out of its range.
    """

    def __init__(
        self,
        model: Any,
        task: str | None = None,
        device: str | int | torch.device | None = None,
        *,
        processor: Any = None,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        merge: str | None = None,
        batch_size: int = 4,
        intensity_range: tuple[float, float] | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            if processor is not None:
                raise ValueError("processor is read from the model's directory; give it only with a loaded model")
            model, processor = load_checkpoint(model)
        elif processor is None:
            raise ValueError("processor is needed when model is a loaded model")
        else:
            check_agreement(model.config, processor, type(model).__name__)
        self.task = task or processor.task or model.config.task
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {self.task!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = _checked_device(device)
        self.model = model.to(self.device).eval()
        self.processor = copy.copy(processor)
        self.processor.task = None  # the task is chosen here; no method is hidden
        overrides = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_mask_area_threshold,
        }
        for name, value in overrides.items():
            if value is None:
                continue
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0..1, got {value}")
            setattr(self.processor, name, value)
        if overlap_mask_area_threshold is not None:
            self.processor.stuff_overlap_mask_area_threshold = None
        if merge is not None:
            check_merge(merge, self.task)
            self.processor.panoptic_merge = merge
        self.batch_size = batch_size
        self.intensity_range = processor.intensity_range if intensity_range is None else intensity_range
        self.id2label = {int(label): str(name) for label, name in model.config.id2label.items()}

    def __call__(self, images: AnyInput | Iterable[AnyInput]) -> list[SegmentationResult]:
        """Results in the order of the images; a single image gives a list of one. See `stream` for many images.

        Args:
            images: paths, PIL images or arrays ((H, W), (H, W, 3) or (H, W, 4), uint8, or one channel of any type with
                `intensity_range`), of any sizes.

        Raises:
            ValueError: an image cannot be read; the message names its file or position.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)):
            images = [images]
        batches = self._batches(images, self.batch_size)
        return [result for batch in batches for result in self._results(self._forward(self._prepare(batch)))]

    def stream(
        self, source: Any, *, queue_size: int = 4, on_full: str = "block", on_bad_sample: str = "raise"
    ) -> Iterator[SegmentationResult]:
        """Results one after the other, in the order of the frames, with a memory that does not grow.

        Reading, the forward pass and post-processing work at the same time, each on another batch. A frame without a
        file is named by its number, `image-0001` and so on; numbers of dropped and skipped frames are missing.

        Args:
            source: a video file, the URL of a video (`rtsp://...`) or the number of a camera (these need OpenCV), a
                folder, one image, or an iterable of what the call takes.
            queue_size: batches that may wait between two stages.
            on_full: where the model is behind: "block", the source waits and every frame gets a result; or "drop", for
                cameras: frames go through one by one, and the oldest that waits is forgotten for a new one.
            on_bad_sample: "raise" the ValueError of an image that cannot be read, or "skip" it with a warning.

        Raises:
            ValueError: an image cannot be read, after the results of the batches before it; the message names its file
                or position; or an argument that is not allowed.
            ImportError: a video without OpenCV.
        """
        if on_full not in ("block", "drop"):
            raise ValueError(f"on_full must be 'block' or 'drop', got {on_full!r}")
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}")
        check_on_bad_sample(on_bad_sample)
        batches = self._batches(frames_of(source), self.batch_size if on_full == "block" else 1)
        stages = (partial(self._prepare, on_bad_sample=on_bad_sample), self._forward)
        prepared = overlapped(batches, stages, queue_size=queue_size, drop=on_full == "drop")
        return (result for batch in prepared for result in self._results(batch))

    def _batches(self, images: Iterable[AnyInput], size: int) -> Iterator[_Batch]:
        names = UniqueNames()
        numbered = enumerate(images)
        while taken := list(islice(numbered, size)):
            yield _Batch(taken, [names.name(image, index) for index, image in taken])

    def _prepare(self, batch: _Batch, on_bad_sample: str = "raise") -> _Batch:
        """Read and processed; with "skip" without the images that cannot be read, and perhaps without any."""
        read = _Batch([], [])
        for (index, image), name in zip(batch.sources, batch.names, strict=True):
            try:
                read.images.append(self._read(image, index))
            except ValueError as error:
                if on_bad_sample == "raise":
                    raise
                logger.warning("skipped: %s", error)
                continue
            read.sources.append((index, image))
            read.names.append(name)
        runs = runs_of_one_canvas(self.processor, _sizes(read.images))
        read.tensors = [self.processor(images=read.images[run], return_tensors="pt") for run in runs]
        return read

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> _Batch:
        names = ("pixel_values", "pixel_mask")
        batch.tensors = [
            self.model(**{name: inputs[name].to(self.device) for name in names}) for inputs in batch.tensors
        ]
        return batch

    @torch.inference_mode()
    def _results(self, batch: _Batch) -> list[SegmentationResult]:
        sizes = _sizes(batch.images)
        found: list[tuple[np.ndarray, list[dict[str, Any]]]] = []
        for outputs in batch.tensors:
            start = len(found)
            found += self._found(outputs, sizes[start : start + len(outputs["class_queries_logits"])])
        return [
            SegmentationResult(
                segmentation=segmentation.astype(np.int32, copy=False),
                segments=[self._describe(segmentation, segment) for segment in segments],
                task=self.task,
                id2label=self.id2label,
                image=image,
                name=name,
                file_name=str(source) if isinstance(source, (str, Path)) else None,
            )
            for (segmentation, segments), image, name, (_, source) in zip(
                found, batch.images, batch.names, batch.sources, strict=True
            )
        ]

    def _found(self, outputs: Any, sizes: list[tuple[int, int]]) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
        """Map and segments of each image of one forward pass."""
        if self.task == "semantic":
            return self._semantic(outputs, sizes)
        method = getattr(self.processor, f"post_process_{self.task}_segmentation")
        return [
            (result["segmentation"].cpu().numpy(), result["segments_info"])
            for result in method(outputs, target_sizes=sizes)
        ]

    def _semantic(self, outputs: Any, sizes: list[tuple[int, int]]) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
        """One segment per class present, id = label id + 1; its score is the mean share of the class in its pixels."""
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        found = []
        for label_map, (class_logits, mask_logits, size, extent) in zip(
            maps, logits_per_image(outputs, sizes), strict=True
        ):
            scores = semantic_scores(class_logits, mask_logits, self.processor.class_activation)  # (K, h, w)
            shares = scores / scores.sum(dim=0, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
            segments = []
            for label in label_map.unique().tolist():
                share = resize_maps(shares[label : label + 1], size, extent)[0]  # (H, W)
                score = float(share[label_map == label].mean())
                segments.append({"id": label + 1, "label_id": label, "score": score})
            found.append((label_map.cpu().numpy() + 1, segments))
        return found

    def _describe(self, segmentation: np.ndarray, segment: dict[str, Any]) -> dict[str, Any]:
        rle = segment["rle"] if "rle" in segment else encode_rle(segmentation == segment["id"])
        return {
            "id": int(segment["id"]),
            "label_id": int(segment["label_id"]),
            "label": self.id2label[int(segment["label_id"])],
            "score": round(float(segment["score"]), SCORE_DECIMALS),
            "rle": rle,
            "area": rle_area(rle),
            "bbox": rle_bbox(rle),
        }

    def _read(self, image: AnyInput, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        if isinstance(image, (str, Path)):
            if Path(image).is_dir():
                raise ValueError(f"{image} is a folder; Predictor.stream and `hf-maskformer predict` take folders")
            return read_image(image, self.intensity_range)
        where = f"image {index}"
        if isinstance(image, np.ndarray):
            image = _pil_image(image, where)
        if not isinstance(image, Image.Image):
            raise ValueError(f"{where} must be a path, a PIL image or an array, got {type(image).__name__}")
        return image_to_rgb(ImageOps.exif_transpose(image), where, self.intensity_range)


def _sizes(images: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(image.shape[0], image.shape[1]) for image in images]


def _checked_device(device: str | int | torch.device | None) -> torch.device:
    """The device, which must exist: 0 is the first GPU, as in transformers' pipelines; None: a GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one that torch finds here, such as 'cpu' or 'cuda:0', got {device!r} with "
            f"{torch.cuda.device_count()} GPUs: {error}"
        ) from error
    return checked


def _pil_image(array: np.ndarray, where: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{where} must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if channels == 1:
        array = array.reshape(array.shape[:2])
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if channels == 1 and array.dtype.kind in "iuf":
        return Image.fromarray(array.astype(np.float32))  # read_image's rule for more than 8 bits applies
    raise ValueError(
        f"{where} has values {array.min()}..{array.max()} of type {array.dtype}; allowed: uint8, and other numbers "
        f"for images of one channel together with intensity_range"
    )
