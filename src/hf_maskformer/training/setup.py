"""From a TrainConfig to data, model, processor and augmentation."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.collate import TrainingDataset
from hf_maskformer.data.load import SegmentationData, load
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training.checkpoint import MODEL_FOLDER
from hf_maskformer.training.config import TrainConfig


def load_splits(config: TrainConfig) -> tuple[SegmentationData, SegmentationData | None]:
    """Training and evaluation data with the same classes; the second is None without `val_split`."""
    common: dict[str, Any] = {"task": config.task, "format": config.format}
    common["on_bad_sample"] = config.on_bad_sample
    if config.intensity_range is not None:
        common["intensity_range"] = config.intensity_range
    train_data = load(config.dataset, split=config.train_split, **common, **config.dataset_options)
    if config.val_split is None:
        return train_data, None
    val_data = load(config.dataset, split=config.val_split, **common, **config.val_dataset_options)
    if val_data.label_spec.id2label != train_data.label_spec.id2label:
        raise ValueError(
            f"{config.dataset}: the classes of {config.val_split} are {val_data.label_spec.id2label}; "
            f"those of {config.train_split} are {train_data.label_spec.id2label}; they must be the same"
        )
    return train_data, val_data


def build_model(
    config: TrainConfig, data: SegmentationData, checkpoint: Path | None
) -> tuple[HfMaskFormerForUniversalSegmentation, HfMaskFormerImageProcessor]:
    """The model and its processor: resumed, started from other weights, or a preset with random ones.

    With `init_from`, parameters whose shape follows the number of classes start anew where it differs.
    """
    if checkpoint is not None:
        folder = checkpoint / MODEL_FOLDER
        model = HfMaskFormerForUniversalSegmentation.from_pretrained(folder)
        return model, HfMaskFormerImageProcessor.from_pretrained(folder)
    fields = {
        "id2label": data.label_spec.id2label,
        "thing_label_ids": list(data.label_spec.thing_label_ids),
        "task": data.task,
        "ignore_index": data.label_spec.ignore_index,
        **config.config_overrides,
    }
    if config.init_from is not None:
        model = HfMaskFormerForUniversalSegmentation.from_pretrained(
            config.init_from, ignore_mismatched_sizes=True, **fields
        )
    else:
        model = HfMaskFormerForUniversalSegmentation(preset(config.preset, **fields))
    return model, image_processor_for(model.config, intensity_range=config.intensity_range)


def build_augmentation(config: TrainConfig, processor: HfMaskFormerImageProcessor) -> TrainAugmentation:
    """The training augmentation; its crop defaults to the processor's canvas."""
    size = processor.size
    crop_size = config.crop_size or (size["max_height"], size["max_width"])
    return TrainAugmentation(
        crop_size=crop_size,
        scale_range=config.scale_range,
        flip_probability=config.flip_probability,
        color_jitter=config.color_jitter,
        max_class_fraction=config.max_class_fraction,
    )


def training_processor(
    processor: HfMaskFormerImageProcessor, crop_size: tuple[int, int]
) -> HfMaskFormerImageProcessor:
    """A processor that pads training crops to the crop's size, not to the larger canvas of evaluation."""
    fields = {**processor.to_dict(), "size": {"max_height": crop_size[0], "max_width": crop_size[1]}}
    return HfMaskFormerImageProcessor.from_dict(fields)


def open_epoch(
    data: SegmentationData, augmentation: TrainAugmentation, seed: int, on_bad_sample: str, epoch: int
) -> TrainingDataset:
    """The training samples of one epoch, augmented as no other epoch's."""
    epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return TrainingDataset(data, augmentation, seed=epoch_seed, on_bad_sample=on_bad_sample)
