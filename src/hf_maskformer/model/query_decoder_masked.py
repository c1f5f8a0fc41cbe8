"""Mask2Former's query decoder: cross-attention within the mask that the layer before predicted (sec. 3.2.1, 3.2.3).

Layer l looks at one map, as published those of stride 32, 16 and 8 in turn. A query sees the cells where its own mask,
resized to that map, is foreground; a query whose mask is empty there sees everything. Order within a layer: masked
cross-attention, self-attention, feed-forward. Queries are learned features with learned positions; they are predicted
from before the first layer too, which makes the first attention mask.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import Attention, FeedForward, resize_padding
from .mask_head import DotProductMaskHead, mask_products
from .position_encoding import SinePositionEncoding2d
from .query_decoder_standard import MEMORY_STRIDES, LayerPrediction


class MaskedQueryDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward; norm after each residual sum."""

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
        self.cross_attention = Attention(dim, heads=heads, dropout=attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads=heads, dropout=attention_dropout)
        self.self_attention_norm = nn.LayerNorm(dim)
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
        blocked: Tensor,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`states`, `query_positions` (B, Q, C); `memory` (B, L, C); `blocked` (B, Q, L), True where not to look."""
        attended, weights = self.cross_attention(
            states + query_positions,
            memory + memory_positions,
            memory,
            blocked=blocked,
            need_weights=need_weights,
        )
        states = self.cross_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        located = states + query_positions
        attended, _ = self.self_attention(located, located, states)
        states = self.self_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        return self.feed_forward_norm(states + self.feed_forward(states)), weights


class MaskedQueryDecoder(nn.Module):
    """A stack of masked layers that take the maps in turn; one norm and one pair of heads for all predictions."""

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
        memory_strides: Sequence[int] = (32, 16, 8),
    ) -> None:
        super().__init__()
        # Places of the maps, counted from the coarsest, in the order in which the layers look at them.
        self.levels = [MEMORY_STRIDES.index(stride) - len(MEMORY_STRIDES) for stride in memory_strides]
        widths = [memory_channels[level] for level in self.levels]
        self.input_projections = nn.ModuleList(
            nn.Conv2d(width, dim, kernel_size=1) if width != dim else nn.Identity() for width in widths
        )
        self.level_codes = nn.Embedding(len(self.levels), dim)
        self.position_encoding = SinePositionEncoding2d(dim)
        self.query_features = nn.Embedding(num_queries, dim)
        self.query_positions = nn.Embedding(num_queries, dim)
        self.layers = nn.ModuleList(
            MaskedQueryDecoderLayer(
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
        mask_head: DotProductMaskHead,
        all_layers: bool,
        need_weights: bool = False,
        full_masks: bool = True,
    ) -> list[LayerPrediction]:
        """As `StandardQueryDecoder`, with one prediction more: the queries before the first layer.

        With `full_masks` False only the last layer's mask logits are made; attention needs them at the resolution of
        its maps only, and so does a loss on points.
        """
        pixels = mask_head.pixel_factor(mask_features)
        tokens, positions, paddings, resized = self._levels(memory, pixels, padding)
        images = mask_features.shape[0]
        query_positions = self.query_positions.weight.expand(images, -1, -1)  # (B, Q, C)
        states = self.query_features.weight.expand(images, -1, -1)
        normed, weights = self.norm(states), None
        predictions = []
        for index in range(len(self.layers) + 1):
            last = index == len(self.layers)
            if all_layers or last:
                masks = mask_head(normed, mask_features) if full_masks or last else None
                predictions.append(LayerPrediction(class_head(normed), masks, normed, weights))
            if not last:
                level = index % len(self.levels)
                with torch.no_grad():
                    small = mask_products(mask_head.query_factor(normed), resized[level])  # (B, Q, h, w)
                    blocked = blocked_cells(small, paddings[level])
                states, weights = self.layers[index](
                    states, query_positions, tokens[level], positions[level], blocked, need_weights
                )
                normed = self.norm(states)
        return predictions

    def _levels(
        self, memory: list[Tensor], pixels: Tensor, padding: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor]]:
        """Of each map, in the order of the layers: tokens (B, L, C), position codes, padding (B, L), pixel factor.

        A mask is linear in the pixel factor: resized, this gives the resized masks at a fraction of the cost. It is
        zero in the padding, of which a cell at the image's border would hold a part.
        """
        outside = resize_padding(padding, (pixels.shape[2], pixels.shape[3]))
        if outside is not None:
            pixels = pixels.masked_fill(outside[:, None], 0.0)
        tokens, positions, paddings, resized = [], [], [], []
        for index, (projection, level) in enumerate(zip(self.input_projections, self.levels, strict=True)):
            feature = memory[level]
            size = (feature.shape[2], feature.shape[3])
            level_padding = resize_padding(padding, size)
            codes = self.position_encoding(*size, padding=level_padding, device=feature.device)
            positions.append(codes.to(feature.dtype))
            tokens.append(projection(feature).flatten(2).transpose(1, 2) + self.level_codes.weight[index])
            paddings.append(None if level_padding is None else level_padding.flatten(1))
            with torch.no_grad():
                resized.append(F.interpolate(pixels, size=size, mode="bilinear", align_corners=False))
        return tokens, positions, paddings, resized


def blocked_cells(mask_logits: Tensor, padding: Tensor | None) -> Tensor:
    """Cells that a query must not look at, (B, Q, L), of its mask logits (B, Q, h, w) and the padding (B, L).

    Background and padding are blocked; of a query that would see nothing, only the padding.
    """
    background = mask_logits.flatten(2) < 0  # (B, Q, L), probability below 0.5
    if padding is None:
        return background & ~background.all(-1, keepdim=True)
    hidden = padding[:, None]  # (B, 1, L)
    empty = (background | hidden).all(-1, keepdim=True)
    return (background & ~empty) | hidden
