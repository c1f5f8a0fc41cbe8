"""hf_maskformer: the MaskFormer family in one Transformers-compatible package.

Importing the package registers configuration, model and image processor with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    AutoVideoProcessor,
)

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation, HfMaskFormerModel
from hf_maskformer.presets import list_presets, preset

if TYPE_CHECKING:
    from hf_maskformer.inference.predictor import Predictor

__version__ = "0.1.0"


class _NoVideoProcessor:
    """Answers transformers' search for a video processor, which otherwise asks on stdin whether to run remote code."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
        raise ValueError("hf_maskformer models have no video processor.")


AutoConfig.register(HfMaskFormerConfig.model_type, HfMaskFormerConfig, exist_ok=True)
AutoModel.register(HfMaskFormerConfig, HfMaskFormerModel, exist_ok=True)
AutoModelForUniversalSegmentation.register(HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation, exist_ok=True)
AutoModelForImageSegmentation.register(HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation, exist_ok=True)
AutoImageProcessor.register(
    HfMaskFormerConfig, image_processor_classes={"torchvision": HfMaskFormerImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(HfMaskFormerConfig, _NoVideoProcessor, exist_ok=True)

__all__ = [
    "HfMaskFormerConfig",
    "HfMaskFormerForUniversalSegmentation",
    "HfMaskFormerImageProcessor",
    "HfMaskFormerModel",
    "Predictor",
    "list_presets",
    "preset",
]


def __getattr__(name: str) -> Any:
    """Load the predictor on first use; it draws on rooms that a training script does not need."""
    if name == "Predictor":
        from hf_maskformer.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'hf_maskformer' has no attribute {name!r}")
