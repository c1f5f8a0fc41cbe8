"""Metrics: arrays in, numbers out. `hf_maskformer.evaluation.evaluate` runs a model over a data set and feeds them."""

from hf_maskformer.evaluation.boundary import BoundaryIoU
from hf_maskformer.evaluation.instance import MaskAveragePrecision
from hf_maskformer.evaluation.panoptic import PanopticQuality
from hf_maskformer.evaluation.semantic import MeanIoU
from hf_maskformer.evaluation.table import format_table
from hf_maskformer.evaluation.volume import VolumeDice

__all__ = ["BoundaryIoU", "MaskAveragePrecision", "MeanIoU", "PanopticQuality", "VolumeDice", "format_table"]
