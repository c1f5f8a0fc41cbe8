"""Mask heads: query states (B, Q, C) and per-pixel embedding (B, E, H, W) -> mask logits (B, Q, H, W)."""

import math

import torch
from torch import Tensor, nn

from .layers import MLP

PLACE_FREQUENCIES = 6  # up to 16 turns over the canvas: a place to about 1/64 of its side


class DotProductMaskHead(nn.Module):
    """An MLP turns a query into a mask embedding; a mask is its dot product with the pixels (MaskFormer, sec. 3.3)."""

    def __init__(self, dim: int, *, mask_dim: int, layers: int) -> None:
        super().__init__()
        self.embedding = MLP(dim, dim, mask_dim, layers=layers)

    def forward(self, states: Tensor, mask_features: Tensor) -> Tensor:
        return torch.einsum("bqe,behw->bqhw", self.embedding(states), mask_features)


class LocatedDotProductMaskHead(DotProductMaskHead):
    """The dot product plus a second one with fixed Fourier codes of the pixel's place on the canvas.

    A plain dot product can tell two equal objects apart only where the pixel embedding itself encodes place, which a
    network with random weights has to learn first; CondInst (Tian et al. 2020) and SOLO hand coordinates to the mask
    branch for the same reason. With random weights every query starts with a place of its own, which steadies the
    matching.
    """

    def __init__(self, dim: int, *, mask_dim: int, layers: int) -> None:
        super().__init__(dim, mask_dim=mask_dim, layers=layers)
        self.place = nn.Linear(dim, 4 * PLACE_FREQUENCIES)

    def forward(self, states: Tensor, mask_features: Tensor) -> Tensor:
        codes = place_codes(mask_features)  # (F, H, W)
        return super().forward(states, mask_features) + torch.einsum("bqf,fhw->bqhw", self.place(states), codes)


def place_codes(mask_features: Tensor) -> Tensor:
    """Sines and cosines of row and column at 1/2, 1, 2, ... turns over the canvas: (4 * PLACE_FREQUENCIES, H, W)."""
    turns = math.pi * 2.0 ** torch.arange(PLACE_FREQUENCIES, device=mask_features.device)  # (K,)
    height, width = mask_features.shape[-2:]
    rows = (torch.arange(height, device=mask_features.device) + 0.5) / height
    columns = (torch.arange(width, device=mask_features.device) + 0.5) / width
    row_phase = (turns[:, None] * rows)[:, :, None].expand(-1, -1, width)  # (K, H, W)
    column_phase = (turns[:, None] * columns)[:, None, :].expand(-1, height, -1)
    codes = torch.cat([row_phase.sin(), row_phase.cos(), column_phase.sin(), column_phase.cos()])
    return codes.to(mask_features.dtype)
