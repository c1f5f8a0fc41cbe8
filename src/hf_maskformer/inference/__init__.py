"""Predictions for images: a saved model or directory in, segments, pictures and files out."""

from hf_maskformer.inference.predictor import Predictor
from hf_maskformer.inference.results import SegmentationResult

__all__ = ["Predictor", "SegmentationResult"]
