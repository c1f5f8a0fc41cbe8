"""Mask heads: query states (B, Q, C) and per-pixel embedding (B, E, H, W) -> mask logits (B, Q, H, W).

Every head takes the queries' anchors (B, Q, 2) as a third argument; only the anchored one needs them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MLP
from .objectness import NO_ANCHOR

PLACE_FREQUENCIES = 6  # up to 16 turns over the canvas: a place to about 1/64 of its side
PLACE_UNIT = 8  # cells of the mask, 32 pixels: the unit of places relative to an anchor


class DotProductMaskHead(nn.Module):
    """An MLP turns a query into a mask embedding; a mask is its dot product with the pixels (MaskFormer, sec. 3.3).

    `query_factor` and `pixel_factor` are the two sides of the product, for those who need only some of the masks or
    only some of their pixels.
    """

    def __init__(self, dim: int, *, mask_dim: int, layers: int) -> None:
        super().__init__()
        self.embedding = MLP(dim, dim, mask_dim, layers=layers)

    def query_factor(self, states: Tensor) -> Tensor:
        """(..., C) -> (..., F)"""
        return self.embedding(states)

    def pixel_factor(self, mask_features: Tensor) -> Tensor:
        """(B, E, H, W) -> (B, F, H, W)"""
        return mask_features

    def forward(self, states: Tensor, mask_features: Tensor, anchors: Tensor | None = None) -> Tensor:
        return mask_products(self.embedding(states), mask_features)


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

    def query_factor(self, states: Tensor) -> Tensor:
        return torch.cat([self.embedding(states), self.place(states)], -1)

    def pixel_factor(self, mask_features: Tensor) -> Tensor:
        codes = place_codes(mask_features).expand(mask_features.shape[0], -1, -1, -1)  # (B, F, H, W)
        return torch.cat([mask_features, codes], 1)

    def forward(self, states: Tensor, mask_features: Tensor, anchors: Tensor | None = None) -> Tensor:
        codes = place_codes(mask_features)  # (F, H, W)
        return super().forward(states, mask_features) + torch.einsum("bqf,fhw->bqhw", self.place(states), codes)


class AnchoredDotProductMaskHead(DotProductMaskHead):
    """The dot product plus a paraboloid around the query's anchor, whose shape the query decides.

    Coordinates relative to the object are what CondInst (Tian et al. 2020, sec. 3.1) hands to its mask branch. Here
    they make a closed form: -a_y y^2 - a_x x^2 + b_y y + b_x x + c of the place relative to the anchor, a > 0. At the
    start every anchored query is a disc, so that training has to correct its border instead of finding its object. A
    query without an anchor has the dot product alone.
    """

    def __init__(self, dim: int, *, mask_dim: int, layers: int) -> None:
        super().__init__(dim, mask_dim=mask_dim, layers=layers)
        self.place = nn.Linear(dim, 5)  # a_y, a_x (before softplus), b_y, b_x, c

    def forward(self, states: Tensor, mask_features: Tensor, anchors: Tensor | None = None) -> Tensor:
        logits = super().forward(states, mask_features)
        if anchors is None:
            raise ValueError("mask_head 'anchored_dot_product' needs the anchors of query_decoder 'anchored'")
        height, width = mask_features.shape[-2:]
        row = torch.arange(height, device=states.device) - anchors[..., :1]  # (B, Q, H)
        column = torch.arange(width, device=states.device) - anchors[..., 1:]  # (B, Q, W)
        row, column = row.to(states.dtype) / PLACE_UNIT, column.to(states.dtype) / PLACE_UNIT
        place = self.place(states) * (anchors[..., :1] != NO_ANCHOR)  # (B, Q, 5)
        anchored = (anchors[..., :1] != NO_ANCHOR).to(states.dtype)  # (B, Q, 1)
        curve = F.softplus(place[..., :2]) * anchored  # (B, Q, 2)
        rows = (place[..., 2:3] - curve[..., :1] * row) * row + place[..., 4:]  # (B, Q, H)
        columns = (place[..., 3:4] - curve[..., 1:] * column) * column  # (B, Q, W)
        return logits + rows[..., :, None] + columns[..., None, :]


def masks_by_convolution(
    states: Tensor, features: Tensor, anchors: Tensor | None = None, *, head: DotProductMaskHead, projection: nn.Conv2d
) -> Tensor:
    """The masks of a dot product with `projection(features)`, without the projected map: (B, Q, H, W).

    A convolution is linear, so query and projection make a kernel for each mask: less work than projecting as soon as
    there are fewer queries than embedding dimensions. `features` (B, C, H, W).
    """
    queries = head.query_factor(states)  # (B, Q, E)
    kernels = torch.einsum("bqe,ecij->bqcij", queries, projection.weight)
    offsets = queries @ projection.bias if projection.bias is not None else queries.new_zeros(queries.shape[:2])
    masks = [
        F.conv2d(image[None], kernel, offset, padding=projection.padding)
        for image, kernel, offset in zip(features, kernels, offsets, strict=True)
    ]
    return torch.cat(masks)


def mask_products(queries: Tensor, pixels: Tensor) -> Tensor:
    """(B, Q, F), (B, F, H, W) -> (B, Q, H, W)"""
    return torch.einsum("bqf,bfhw->bqhw", queries, pixels)


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
