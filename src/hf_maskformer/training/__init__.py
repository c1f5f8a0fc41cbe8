"""Training: one readable loop (`train.py`) and the small objects it calls; transformers' Trainer (`hf_trainer.py`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_maskformer.training.hf_trainer import (
        EvaluationDataset,
        HfMaskFormerTrainer,
        TrainerCollator,
        TrainerMetrics,
    )

__all__ = ["EvaluationDataset", "HfMaskFormerTrainer", "TrainerCollator", "TrainerMetrics"]


def __getattr__(name: str) -> Any:
    """Load the parts for transformers' Trainer on first use; the loop does not need them."""
    if name in __all__:
        from hf_maskformer.training import hf_trainer

        return getattr(hf_trainer, name)
    raise AttributeError(f"module 'hf_maskformer.training' has no attribute {name!r}")
