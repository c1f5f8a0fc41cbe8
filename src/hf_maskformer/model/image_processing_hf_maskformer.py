"""Image processor of hf_maskformer: images and annotations in, padded tensors out; logits in, segments out.

By default every image is fitted into one canvas (`size={"max_height", "max_width"}`), so that any two results can be
batched. `size={"shortest_edge", "longest_edge"}` and `size={"height", "width"}` resize as transformers'
MaskFormerImageProcessor does (Cheng et al., "Per-Pixel Classification is Not All You Need", NeurIPS 2021).
"""

import difflib
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.utils import logging

from .image_conversion import list_images, new_zeros, padded_size, resized_size, to_rgb_tensor, write_normalized
from .label_spec import LabelSpec
from .mask_wise_merge import mask_wise_segments
from .masks import decode_rles
from .official_processor import (
    IDENTITY_KEYS,
    RENAMED_KEYS,
    SIZE_KEYS,
    from_official,
    is_official,
    rename_old,
    to_official,
)
from .postprocess import (
    check_label_ids,
    instance_candidates,
    instance_segments,
    logits_per_image,
    output_field,
    panoptic_segments,
    semantic_map,
    semantic_scores,
)
from .processor_settings import (
    PANOPTIC_MERGES,
    PIPELINE_THRESHOLDS,
    TASKS,
    HfMaskFormerImageProcessorKwargs,
    check_choice,
    checked_settings,
    labels_of,
    reset_things,
)
from .resampling import native_size, resize_maps
from .target_encoding import Frame, LabelRules, encode_targets
from .target_inputs import TargetInputs
from .task_methods import hidden_for_tasks

logger = logging.get_logger(__name__)


class HfMaskFormerImageProcessor(TorchvisionBackend):
    """Prepare images and annotations for the model and turn its outputs into segmentations.

    Args:
        size: `{"max_height", "max_width"}`: fit inside, keep the aspect ratio, pad bottom and right to exactly this
            canvas. `{"shortest_edge", "longest_edge"}` or `{"height", "width"}`: as transformers' MaskFormer, sides
            rounded up to a multiple of `size_divisor`, padded to the largest image of the batch.
        size_divisor: Multiple that the padded height and width have outside the canvas mode.
        pad_size: `{"height", "width"}` to pad to, instead of the canvas or the largest image.
        ignore_index: Value of pixels in segmentation maps that belong to no label; None: every pixel has a label.
        do_reduce_labels: Segmentation maps hold 0 for "no label" and 1..K for the labels; ignore_index stays ignored.
            Concerns maps and `instance_id_to_semantic_id`; `annotations` and `class_labels` are never shifted.
        id2label: Names of the label ids 0..K-1. When set, every target is checked against it.
        thing_label_ids: Labels with countable instances; None: not known.
        task: "semantic", "instance", "panoptic" or None. Hides the post-processing methods of the other tasks.
        class_activation: "softmax" or "sigmoid", how the class logits are read.
        threshold: Score above which a query is kept.
        mask_threshold: Probability from which a pixel belongs to a mask.
        overlap_mask_area_threshold: Part of a mask that must stay visible, or the segment is dropped.
        stuff_overlap_mask_area_threshold: The same for stuff in mask-wise merging; None: no difference. Stuff are the
            labels that are not things, none if things are not known. Only this merge treats stuff differently.
        panoptic_merge: "argmax" (MaskFormer) or "mask_wise" (Panoptic SegFormer), how masks become panoptic segments.
        intensity_range: (low, high) of images with more than 8 bits or of floats: black and white. Without it such
            images are refused.
    """

    valid_kwargs = HfMaskFormerImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - the base class declares it so

    do_resize = True
    size = {"max_height": 512, "max_width": 512}  # noqa: RUF012 - copied for each instance by the base class
    size_divisor = 32
    resample = 2  # bilinear
    default_to_square = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    pad_size = None
    ignore_index = 255
    do_reduce_labels = False
    id2label = None
    thing_label_ids = None
    task = None
    class_activation = "softmax"
    threshold = 0.5
    mask_threshold = 0.5
    overlap_mask_area_threshold = 0.8
    stuff_overlap_mask_area_threshold = None
    panoptic_merge = "argmax"
    intensity_range = None

    def __init__(self, **kwargs: Any) -> None:
        settings = {key: value for key, value in rename_old(kwargs).items() if key not in IDENTITY_KEYS}
        self._check_names(settings)
        super().__init__(**settings)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task":  # a misspelt one would hide no method, and be saved
            check_choice("task", value, (*TASKS, None))
        super().__setattr__(name, value)

    @property
    def label_spec(self) -> LabelSpec | None:
        """The labels as one object, or None if `id2label` is not set."""
        return labels_of(self.id2label, self.thing_label_ids, self.ignore_index)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the fields of our own file or of an official MaskFormer / Mask2Former one.

        `id2label` given without `thing_label_ids` resets the latter as `HfMaskFormerConfig` does.

        Raises:
            ValueError: a field of an official file has no counterpart, or an override looks misspelt.
        """
        fields = dict(image_processor_dict)
        fields = from_official(fields) if is_official(fields) else fields
        overrides = rename_old(kwargs)
        misspelt = [key for key in overrides if difflib.get_close_matches(key, [*cls._names(), *SIZE_KEYS], 1, 0.8)]
        cls._check_names(misspelt)  # others belong to loading (trust_remote_code and the like)
        if reset_things(fields, overrides):
            logger.warning("id2label was replaced without thing_label_ids: they are reset to the task's default.")
        return super().from_dict(fields, **overrides)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Any:
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def to_official_dict(self, kind: str = "MaskFormerImageProcessor") -> dict[str, Any]:
        """The content of a preprocessor_config.json for transformers' MaskFormer- or Mask2FormerImageProcessor.

        Raises:
            ValueError: a setting that would change results cannot be expressed there.
        """
        settings = {name: getattr(self, name) for name in self._names()}
        for name in ("size", "pad_size"):
            settings[name] = None if settings[name] is None else dict(settings[name])
        return to_official(settings, None if self.id2label is None else len(self.id2label), kind=kind)

    def save_official(self, save_directory: str | Path, kind: str = "MaskFormerImageProcessor") -> None:
        """Write `to_official_dict()` as preprocessor_config.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_official_dict(kind), indent=2, sort_keys=True) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        annotations: Any = None,
        instance_id_to_semantic_id: Any = None,
        masks: Any = None,
        class_labels: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image or a list of images, and their annotations, for the model.

        Args:
            images: PIL images of any mode, paths, (H, W), (H, W, C) or (C, H, W) arrays or tensors.
            segmentation_maps: (H, W) maps of labels, or of instance ids with `instance_id_to_semantic_id`, or the
                RGB panoptic PNGs that belong to panoptic `annotations`.
            annotations: COCO instance records `{"image_id", "annotations": [...]}` or COCO panoptic records
                `{"segments_info": [...]}`. Crowds are skipped. Category ids are label ids.
            instance_id_to_semantic_id: One dict, or one per image.
            masks: Per image (N, H, W) masks or N RLE dicts or (H, W) masks; they may overlap. Needs `class_labels`.
            class_labels: Per image N label ids.

        Returns:
            `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64, 1 = image; with annotations also
            `mask_labels`, a list of (N_i, H, W) bool (padding False), and `class_labels`, a list of (N_i,) int64.
            The masks of a batch are views of one block of memory. A mask that loses its last pixel by resizing is
            left out together with its label.

        Raises:
            ValueError: naming the image and the value that is wrong, and what is allowed.
        """
        flat, single = list_images(images)
        targets = TargetInputs.collect(
            len(flat), single, segmentation_maps, annotations, instance_id_to_semantic_id, masks, class_labels
        )
        settings = rename_old(kwargs)
        self._check_names(settings)
        return super().preprocess(flat, targets, return_tensors=return_tensors, **settings)

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Bring settings to one form and check them; used for the constructor and for each call."""
        return super()._standardize_kwargs(**checked_settings(size, kwargs))

    def _preprocess_image_like_inputs(self, images: list[Any], targets: Any, **kwargs: Any) -> BatchFeature:
        """Convert, resize, normalise and pad the images, and encode the targets to match."""
        tensors = [to_rgb_tensor(image, f"image {index}", **kwargs) for index, image in enumerate(images)]
        image_sizes: list[tuple[int, int]] = [(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors]
        sizes = [resized_size(image_size, **kwargs) for image_size in image_sizes]
        canvas = padded_size(sizes, **kwargs)
        device = tensors[0].device
        pixel_values = new_zeros((len(tensors), 3, *canvas), torch.float32, device)
        pixel_mask = new_zeros((len(tensors), *canvas), torch.int64, device)
        for index, (height, width) in enumerate(sizes):
            resized = self.resize(tensors.pop(0), SizeDict(height=height, width=width), resample=kwargs["resample"])
            write_normalized(resized, pixel_values[index, :, :height, :width], **kwargs)
            pixel_mask[index, :height, :width] = 1
            del resized  # nothing but the batch stays
        data = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        features = BatchFeature(data, tensor_type=kwargs["return_tensors"])
        if targets is not None:
            labels = labels_of(kwargs["id2label"], (), kwargs["ignore_index"])
            rules = LabelRules(labels, kwargs["ignore_index"], bool(kwargs["do_reduce_labels"]))
            frames = [Frame(image_size, size, canvas) for image_size, size in zip(image_sizes, sizes, strict=True)]
            features["mask_labels"], features["class_labels"] = encode_targets(targets, rules, frames)
        return features

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """Label of each pixel.

        Returns:
            per image a (H, W) int64 map of label ids; with `return_segmentation_scores` an object with
            `segmentation` and `segmentation_scores` (K, H, W).
        """
        results = []
        for class_logits, mask_logits, target_size, extent in self._per_image(outputs, target_sizes):
            scores = semantic_scores(class_logits, mask_logits, self.class_activation)
            if not return_segmentation_scores:
                results.append(semantic_map(scores, target_size, extent))
                continue
            resized = resize_maps(scores, target_size or native_size(scores, extent), extent)
            fields = {"segmentation": resized.argmax(dim=0), "segmentation_scores": resized}
            results.append(SemanticSegmentationPostProcessorOutput(data=fields))
        return results

    @hidden_for_tasks("semantic")
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: Any = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
    ) -> list[dict[str, Any]]:
        """Instances, best first; `postprocess.instance_candidates` and `instance_segments` hold the rules.

        Thresholds that are None are the processor's own. If things are known, only they are returned: none at all if
        every label is stuff (`thing_label_ids=[]`).

        Returns:
            per image `segmentation` and `segments_info` (id, label_id, was_fused, score, rle = its whole mask).
            `segmentation` is the (H, W) int32 id map, 0 = void; with `return_coco_annotation` the list of the
            segments' RLE dicts; with `return_binary_maps` their whole masks, (N, H, W) bool.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps cannot both be True")
        settings = self._thresholds(outputs, threshold, mask_threshold, overlap_mask_area_threshold)
        overlap = settings.pop("overlap_mask_area_threshold")
        del settings["stuff_overlap_mask_area_threshold"]
        results = []
        for class_logits, mask_logits, target_size, extent in self._per_image(outputs, target_sizes):
            size = target_size or native_size(mask_logits, extent)
            candidates = instance_candidates(
                class_logits,
                mask_logits,
                target_size=size,
                extent=extent,
                activation=self.class_activation,
                allowed_labels=self.thing_label_ids,
                **settings,
            )
            result = instance_segments(candidates, size, overlap, mask_logits.device)
            rles = [segment["rle"] for segment in result["segments_info"]]
            if return_coco_annotation:
                result["segmentation"] = rles
            elif return_binary_maps:
                result["segmentation"] = torch.from_numpy(decode_rles(rles, size)).to(mask_logits.device)
            results.append(result)
        return results

    @hidden_for_tasks("semantic", "instance")
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Any = None,
        merge: str | None = None,
    ) -> list[dict[str, Any]]:
        """One segment per pixel.

        Args:
            threshold, mask_threshold, overlap_mask_area_threshold: None are the processor's own, whatever the merge.
                An overlap threshold that is given counts for things and stuff.
            label_ids_to_fuse: None means all labels that are not things; nothing is fused if things are not known.
            merge: "argmax" by the rules of `postprocess.panoptic_segments`, "mask_wise" by those of
                `mask_wise_merge.mask_wise_segments`; None is the processor's `panoptic_merge`.

        Returns:
            per image `segmentation` (H, W) int32, 0 = void, and `segments_info` (id, label_id, was_fused, score).
        """
        merge = self.panoptic_merge if merge is None else merge
        check_choice("merge", merge, PANOPTIC_MERGES)
        settings = self._thresholds(outputs, threshold, mask_threshold, overlap_mask_area_threshold)
        if label_ids_to_fuse is None:
            labels = range(outputs.class_queries_logits.shape[-1] - 1)
            things = labels if self.thing_label_ids is None else self.thing_label_ids
            label_ids_to_fuse = set(labels) - set(things)
        merged: Callable[..., dict[str, Any]]
        if merge == "mask_wise":
            merged = partial(mask_wise_segments, thing_label_ids=self.thing_label_ids)
        else:
            merged = panoptic_segments
            del settings["stuff_overlap_mask_area_threshold"]
        return [
            merged(
                class_logits,
                mask_logits,
                target_size=target_size,
                extent=extent,
                activation=self.class_activation,
                label_ids_to_fuse=label_ids_to_fuse,
                **settings,
            )
            for class_logits, mask_logits, target_size, extent in self._per_image(outputs, target_sizes)
        ]

    def _per_image(self, outputs: Any, target_sizes: Any) -> Any:
        """Logits, target size and extent of each image; ValueError if model and processor differ in their labels."""
        num_labels = outputs.class_queries_logits.shape[-1] - 1
        if self.id2label is not None and len(self.id2label) != num_labels:
            raise ValueError(f"the outputs have {num_labels} labels, the processor's id2label {len(self.id2label)}")
        check_label_ids("thing_label_ids", self.thing_label_ids or (), num_labels)
        return logits_per_image(outputs, target_sizes)

    def _thresholds(self, outputs: Any, *given: float | None) -> dict[str, Any]:
        """Stored thresholds where none is given. The pipeline (its outputs carry target_size) always passes its own
        constants; exactly these count as not given."""
        from_pipeline = output_field(outputs, "target_size") is not None
        settings: dict[str, Any] = {"stuff_overlap_mask_area_threshold": self.stuff_overlap_mask_area_threshold}
        for (name, pipeline_value), value in zip(PIPELINE_THRESHOLDS.items(), given, strict=True):
            stored = value is None or (from_pipeline and value == pipeline_value)
            settings[name] = getattr(self, name) if stored else value
            if name == "overlap_mask_area_threshold" and not stored:
                settings["stuff_overlap_mask_area_threshold"] = None
        return settings

    @classmethod
    def _names(cls) -> list[str]:
        return list(cls.valid_kwargs.__annotations__)

    @classmethod
    def _check_names(cls, names: Collection[str]) -> None:
        known = cls._names()
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, [*known, *RENAMED_KEYS], 1)
                hint = f", did you mean {nearest[0]!r}?" if nearest else f", known: {sorted(known)}"
                raise ValueError(f"unknown image processor setting {name!r}{hint}")


HfMaskFormerImageProcessor.register_for_auto_class()
