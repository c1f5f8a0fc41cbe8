"""Mask heads: query states (B, Q, C) and per-pixel embedding (B, E, H, W) -> mask logits (B, Q, H, W)."""

import torch
from torch import Tensor, nn

from .layers import MLP


class DotProductMaskHead(nn.Module):
    """An MLP turns a query into a mask embedding; a mask is its dot product with the pixels (MaskFormer, sec. 3.3)."""

    def __init__(self, dim: int, *, mask_dim: int, layers: int) -> None:
        super().__init__()
        self.embedding = MLP(dim, dim, mask_dim, layers=layers)

    def forward(self, states: Tensor, mask_features: Tensor) -> Tensor:
        return torch.einsum("bqe,behw->bqhw", self.embedding(states), mask_features)
