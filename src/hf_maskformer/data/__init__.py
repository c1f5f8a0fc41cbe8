"""Reading, drawing, augmenting and batching segmentation data."""

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.collate import Collator, TrainingDataset
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
    "load",
    "read_image",
    "targets_for_task",
]
