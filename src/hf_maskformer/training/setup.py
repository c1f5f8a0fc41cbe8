"""From a TrainConfig to data, model, processor and augmentation."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.augment_presets import augmentation_preset
from hf_maskformer.data.collate import TrainingDataset
from hf_maskformer.data.load import SegmentationData, load
from hf_maskformer.evaluation.evaluate import check_agreement_with_data
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training.checkpoint import MODEL_FOLDER
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.fine_tuning import fine_tuned_model, freeze_parts
from hf_maskformer.training.lora import adapt, check_peft

# Fields of TrainConfig that, where they are set, replace those of the augmentation.
OVERRIDES = (
    "scale_range",
    "flip_probability",
    "color_jitter",
    "max_class_fraction",
    "vertical_flip_probability",
    "copy_paste_probability",
)

# Arguments of `load` that are fields of TrainConfig themselves, so that both splits and the run's record agree.
FIELDS_OF_LOAD = {
    "path_or_id": "dataset",
    "split": "train_split and val_split",
    "task": "task",
    "format": "format",
    "on_bad_sample": "on_bad_sample",
    "intensity_range": "intensity_range",
}
# Options of `load` that need not be the same for both splits; the others say what the truth means.
OPTIONS_OF_ONE_SPLIT = ("length", "seed", "image_size", "streaming", "shuffle_buffer")
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")  # of a processor
SAME_OPTION = ("thing_labels", "thing_label_ids")  # two names of one thing


def val_options(config: TrainConfig) -> dict[str, Any]:
    """The options to read the val split: its own, and those of the training split that it does not give.

    `OPTIONS_OF_ONE_SPLIT` are never taken from the training split.
    """
    own = config.val_dataset_options
    given = {*own, *(SAME_OPTION if set(SAME_OPTION) & set(own) else ())}
    taken = {
        name: value
        for name, value in config.dataset_options.items()
        if name not in given and name not in OPTIONS_OF_ONE_SPLIT
    }
    return {**taken, **own}


def load_splits(config: TrainConfig) -> tuple[SegmentationData, SegmentationData | None]:
    """Training and evaluation data with the same classes; the second is None without `val_split`."""
    for options in (config.dataset_options, config.val_dataset_options):
        for name in sorted(set(options) & set(FIELDS_OF_LOAD)):
            raise ValueError(f"dataset option {name}={options[name]!r}: set the field {FIELDS_OF_LOAD[name]} instead")
    common: dict[str, Any] = {"task": config.task, "format": config.format}
    common["on_bad_sample"] = config.on_bad_sample
    if config.intensity_range is not None:
        common["intensity_range"] = config.intensity_range
    train_data = load(config.dataset, split=config.train_split, **common, **config.dataset_options)
    if config.val_split is None:
        return train_data, None
    val_data = load(config.dataset, split=config.val_split, **common, **val_options(config))
    if val_data.streaming:
        raise ValueError(
            f"{config.dataset}: {config.val_split} is streamed, but images to evaluate on are taken by their number: "
            "leave streaming out of val_dataset_options"
        )
    check_same_classes(config, train_data.label_spec, val_data.label_spec)
    return train_data, val_data


def check_same_classes(config: TrainConfig, train_spec: LabelSpec, val_spec: LabelSpec) -> None:
    """ValueError if the two splits differ in their classes or in which of them are things."""
    if val_spec.id2label != train_spec.id2label:
        raise ValueError(
            f"{config.dataset}: the classes of {config.val_split} are {val_spec.id2label}; "
            f"those of {config.train_split} are {train_spec.id2label}; they must be the same"
        )
    things, others = ([spec.id2label[label] for label in spec.thing_label_ids] for spec in (val_spec, train_spec))
    if set(things) != set(others):
        raise ValueError(
            f"{config.dataset}: the things (countable classes) of {config.val_split} are {things}; "
            f"those of {config.train_split} are {others}; they must be the same"
        )


def build_model(
    config: TrainConfig, data: SegmentationData, checkpoint: Path | None
) -> tuple[HfMaskFormerForUniversalSegmentation, HfMaskFormerImageProcessor]:
    """The model and its processor: resumed, fine-tuned from other weights, or a preset with random ones.

    Adapters and frozen parts are as `config` says. A model that is fine-tuned normalises images as its checkpoint.

    Raises:
        ValueError: a field of the data set is in `config_overrides`, the checkpoint does not fit (see
            `fine_tuned_model`) or was written for other classes than the data's, or an option names an unknown part.
    """
    if config.lora_rank is not None:
        check_peft()
    if checkpoint is not None:
        model, processor = resumed_model(checkpoint, data)
    else:
        model, processor = new_model(config, data)
    if config.lora_rank is not None:
        adapt(model, config, checkpoint)
    if config.freeze:
        freeze_parts(model, config.freeze)
    return model, processor


def new_model(
    config: TrainConfig, data: SegmentationData
) -> tuple[HfMaskFormerForUniversalSegmentation, HfMaskFormerImageProcessor]:
    """Random or fine-tuned weights for the classes of `data`."""
    fields = {
        "id2label": data.label_spec.id2label,
        "thing_label_ids": list(data.label_spec.thing_label_ids),
        "task": data.task,
        "ignore_index": data.label_spec.ignore_index,
    }
    for name in sorted({*fields, "label2id", "num_labels"} & set(config.config_overrides)):
        raise ValueError(
            f"config_overrides sets {name} to {config.config_overrides[name]!r}, but classes and task come from the "
            "data set: use task and dataset_options"
        )
    fields |= config.config_overrides
    settings: dict[str, Any] = {"intensity_range": config.intensity_range}
    if config.init_from is None:
        model = HfMaskFormerForUniversalSegmentation(preset(config.preset, **fields))
    else:
        model = fine_tuned_model(config.init_from, fields)
        settings |= stored_normalization(config.init_from)
    if config.image_resize == "shortest_edge":
        settings["size"] = shortest_edge_size(model.config.image_size)
    return model, image_processor_for(model.config, **settings)


def stored_normalization(source: str) -> dict[str, Any]:
    """How the checkpoint's own processor turns pixels into numbers; nothing where it has no processor."""
    if Path(source).is_dir() and not (Path(source) / IMAGE_PROCESSOR_NAME).is_file():
        return {}
    try:
        processor = HfMaskFormerImageProcessor.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"init_from {source}: its image processor cannot be loaded: {error}") from error
    return {name: getattr(processor, name) for name in NORMALIZATION}


def resumed_model(
    checkpoint: Path, data: SegmentationData
) -> tuple[HfMaskFormerForUniversalSegmentation, HfMaskFormerImageProcessor]:
    """As stored; ValueError if the data set has other classes, or another task, than it had then."""
    folder = checkpoint / MODEL_FOLDER
    model = HfMaskFormerForUniversalSegmentation.from_pretrained(folder)
    processor = HfMaskFormerImageProcessor.from_pretrained(folder)
    if model.config.task != data.task:
        raise ValueError(f"{checkpoint} was trained for the task {model.config.task!r}, the data is for {data.task!r}")
    try:
        check_agreement_with_data(model.config, processor, data.label_spec, data.task)
    except ValueError as error:
        raise ValueError(f"{checkpoint} does not fit the data set: {error}") from error
    return model, processor


def build_augmentation(config: TrainConfig, processor: HfMaskFormerImageProcessor) -> TrainAugmentation:
    """The training augmentation: a published one or the plain one, with the fields that `config` sets itself.

    Without `augmentation` and `crop_size` the crop is the processor's canvas, or a square of its shortest edge.

    Raises:
        ValueError: `augmentation` is not known, or has no crop of fixed size and a field that needs one is set.
    """
    overrides = {name: getattr(config, name) for name in OVERRIDES if getattr(config, name) is not None}
    if config.augmentation is None:
        return TrainAugmentation(crop_size=config.crop_size or _whole_crop(processor), **overrides)
    augmentation = augmentation_preset(config.augmentation, config.crop_size)
    needs_crop = sorted({"scale_range", "max_class_fraction"} & set(overrides))
    if augmentation.crop_size is None and needs_crop:
        raise ValueError(
            f"augmentation {config.augmentation!r} has no crop of fixed size, so {needs_crop[0]} cannot be "
            f"{overrides[needs_crop[0]]!r}"
        )
    if "scale_range" in overrides:
        overrides["resize"] = None
    return dataclasses.replace(augmentation, **overrides)


def _whole_crop(processor: HfMaskFormerImageProcessor) -> tuple[int, int]:
    size = dict(processor.size)
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["max_height"], size["max_width"]


def training_processor(
    processor: HfMaskFormerImageProcessor, crop_size: tuple[int, int] | None
) -> HfMaskFormerImageProcessor:
    """A processor that pads training crops to the crop's size, not to the larger canvas of evaluation.

    Without a `crop_size` it pads to the largest image of the batch, rounded up to its `size_divisor`.
    """
    if crop_size is None:
        size = shortest_edge_size(dict(processor.size).values())  # crops are not resized any more
    else:
        size = {"max_height": crop_size[0], "max_width": crop_size[1]}
    return HfMaskFormerImageProcessor.from_dict({**processor.to_dict(), "size": size})


def shortest_edge_size(sides: Iterable[int]) -> dict[str, int]:
    """The processor's `size` that brings the shorter side of an image to the smaller of `sides`, or the longer side to
    the larger."""
    shorter, longer = sorted(sides)
    return {"shortest_edge": shorter, "longest_edge": longer}


def open_epoch(
    data: SegmentationData, augmentation: TrainAugmentation, seed: int, on_bad_sample: str, epoch: int
) -> TrainingDataset:
    """The training samples of one epoch, augmented as no other epoch's."""
    return TrainingDataset(
        data,
        augmentation,
        seed=int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]),
        on_bad_sample=on_bad_sample,
    )
