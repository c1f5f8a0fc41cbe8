"""Models as files that run without this package: ONNX (float32, float16, 8 bits) and torch.export programs."""

from hf_maskformer.export.export import Exported, export_model

__all__ = ["Exported", "export_model"]
