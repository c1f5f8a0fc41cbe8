"""MaskFormer's query decoder: DETR's transformer decoder with learned queries (sec. 3.3; Carion et al. 2020).

Contract of every query decoder: `memory, mask_features, padding, heads -> list of per-layer predictions`, first to
last. Post-norm; each layer is self-attention, cross-attention to the coarsest map, feed-forward. Queries start at zero
and carry a learned position code. A final norm, shared by all layers, stands before the heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import Attention, FeedForward, resize_padding
from .position_encoding import SinePositionEncoding2d

MEMORY_STRIDES = (8, 16, 32)  # of the maps that a pixel decoder hands over


class LayerPrediction(NamedTuple):
    """What one decoder layer predicts, with the states it was predicted from."""

    class_logits: Tensor  # (B, Q, K + 1)
    mask_logits: Tensor | None  # (B, Q, H/4, W/4); None where the loss makes what it needs of it from the states
    states: Tensor  # (B, Q, C), after the shared norm
    cross_attention: Tensor | None  # (B, heads, Q, L) when asked for
    anchors: Tensor | None = None  # (B, Q, 2) row and column in the mask, of queries that have a place; -1: none
    objectness: Tensor | None = None  # (B, H/4, W/4) logits of the map that the anchors were picked from
    location: Any = None  # of the last layer: what the location decoder of Panoptic SegFormer predicts


class StandardQueryDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among queries, cross-attention to the memory, feed-forward; norm after each residual sum."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        ffn_dim: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        activation: str,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads=heads, dropout=attention_dropout)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads=heads, dropout=attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(
            dim, hidden_dim=ffn_dim, dropout=dropout, activation=activation, activation_dropout=activation_dropout
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        states: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        memory_padding: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`states` and `query_positions` (B, Q, C), `memory` (B, L, C), `memory_padding` (B, L)."""
        located = states + query_positions
        attended, _ = self.self_attention(located, located, states)
        states = self.self_attention_norm(states + F.dropout(attended, self.dropout, self.training))

        attended, weights = self.cross_attention(
            states + query_positions,
            memory + memory_positions,
            memory,
            key_padding=memory_padding,
            need_weights=need_weights,
        )
        states = self.cross_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        return self.feed_forward_norm(states + self.feed_forward(states)), weights


class StandardQueryDecoder(nn.Module):
    """A stack of decoder layers; every layer's states go through the shared norm and the heads."""

    def __init__(
        self,
        memory_channels: list[int],
        *,
        dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        activation: str,
        num_queries: int,
        memory_stride: int,
    ) -> None:
        super().__init__()
        self.level = MEMORY_STRIDES.index(memory_stride) - len(MEMORY_STRIDES)  # counted from the coarsest
        width = memory_channels[self.level]
        self.input_projection = nn.Conv2d(width, dim, kernel_size=1) if width != dim else nn.Identity()
        self.position_encoding = SinePositionEncoding2d(dim)
        self.query_positions = nn.Embedding(num_queries, dim)
        self.layers = nn.ModuleList(
            StandardQueryDecoderLayer(
                dim,
                heads=heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                activation=activation,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        memory: list[Tensor],
        mask_features: Tensor,
        padding: Tensor | None,
        *,
        class_head: Callable[[Tensor], Tensor],
        mask_head: Callable[[Tensor, Tensor], Tensor],
        all_layers: bool,
        need_weights: bool = False,
    ) -> list[LayerPrediction]:
        """Read one map of `memory`, the coarsest as published; its cells in `padding` (B, H, W) are hidden.

        With `all_layers` False only the last layer is predicted from (inference).
        """
        projected = self.input_projection(memory[self.level])  # (B, C, h, w)
        height, width = projected.shape[-2:]
        padding = resize_padding(padding, (height, width))
        positions = self.position_encoding(height, width, padding=padding, device=projected.device)
        positions = positions.to(projected.dtype)  # (B or 1, h*w, C)
        tokens = projected.flatten(2).transpose(1, 2)  # (B, h*w, C)
        token_padding = None if padding is None else padding.flatten(1)  # (B, h*w)
        query_positions = self.query_positions.weight.expand(tokens.shape[0], -1, -1)  # (B, Q, C)
        states = torch.zeros_like(query_positions)
        predictions = []
        for index, layer in enumerate(self.layers):
            states, weights = layer(states, query_positions, tokens, positions, token_padding, need_weights)
            if all_layers or index == len(self.layers) - 1:
                normed = self.norm(states)
                predictions.append(
                    LayerPrediction(class_head(normed), mask_head(normed, mask_features), normed, weights)
                )
        return predictions
