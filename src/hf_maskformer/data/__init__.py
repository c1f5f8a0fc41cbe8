"""Reading, drawing, augmenting and batching segmentation data."""

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.augment_presets import augmentation_preset, list_augmentation_presets
from hf_maskformer.data.coco_export import to_coco_instance, to_coco_panoptic
from hf_maskformer.data.collate import Collator, TrainingDataset
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import FEATURES, Sample, read_image, targets_for_task
from hf_maskformer.data.segmentation_data import SegmentationData

__all__ = [
    "FEATURES",
    "Collator",
    "Sample",
    "SegmentationData",
    "TrainAugmentation",
    "TrainingDataset",
    "augmentation_preset",
    "inspect_dataset",
    "list_augmentation_presets",
    "load",
    "read_image",
    "targets_for_task",
    "to_coco_instance",
    "to_coco_panoptic",
]
