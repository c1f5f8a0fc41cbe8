"""Queries that start from the pixels of objects, for things; a learned query for each class of stuff.

FastInst (He et al., CVPR 2023, sec. 3.2) picks the pixels; Mask DINO (Li et al., CVPR 2023, sec. 3.3) likewise starts
content and place from the encoder. CLUSTSEG (Liang et al. 2023) found the same division: things want a start that is
adapted to the image, stuff a memory of its class. Each anchored query carries the embedding of its pixel and the
position code of its place, so that from the first step on it stands for one place of the image.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import MLP, resize_padding
from .objectness import NO_ANCHOR, ObjectnessHead, at_anchors, pick_anchors
from .position_encoding import SinePositionEncoding2d
from .query_decoder_standard import MEMORY_STRIDES, LayerPrediction, StandardQueryDecoderLayer


class AnchoredQueryDecoder(nn.Module):
    """Decoder layers as DETR's, after a start from the image; the start itself is the first prediction.

    The first `num_stuff` queries are learned, query j for the j-th class of stuff. The others are anchored.
    """

    def __init__(
        self,
        memory_channels: list[int],
        *,
        mask_dim: int,
        dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        activation: str,
        num_queries: int,
        num_stuff: int,
        memory_stride: int,
    ) -> None:
        super().__init__()
        self.level = MEMORY_STRIDES.index(memory_stride) - len(MEMORY_STRIDES)  # counted from the coarsest
        width = memory_channels[self.level]
        self.input_projection = nn.Conv2d(width, dim, kernel_size=1) if width != dim else nn.Identity()
        self.position_encoding = SinePositionEncoding2d(dim)
        self.num_anchored = num_queries - num_stuff
        self.num_stuff = num_stuff
        self.stuff_queries = nn.Embedding(num_stuff, dim) if num_stuff else None
        self.objectness_head = ObjectnessHead(mask_dim)
        self.content = MLP(mask_dim, dim, dim, layers=2)
        self.content_norm = nn.LayerNorm(dim)
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
        mask_head: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        all_layers: bool,
        need_weights: bool = False,
    ) -> list[LayerPrediction]:
        """As `StandardQueryDecoder`, with one prediction more: the queries before the first layer."""
        projected = self.input_projection(memory[self.level])  # (B, C, h, w)
        objectness = self.objectness_head(mask_features)  # (B, H/4, W/4)
        anchors = pick_anchors(
            objectness, resize_padding(padding, (objectness.shape[1], objectness.shape[2])), count=self.num_anchored
        )
        padding = resize_padding(padding, (projected.shape[2], projected.shape[3]))
        positions = self.position_encoding(
            projected.shape[2], projected.shape[3], padding=padding, device=projected.device
        ).to(projected.dtype)  # (B or 1, h*w, C)
        states, query_positions = self._start(mask_features, positions, projected.shape, anchors)
        no_anchors = anchors.new_full((anchors.shape[0], self.num_stuff, 2), NO_ANCHOR)
        anchors = torch.cat([no_anchors, anchors], 1)  # (B, Q, 2)
        tokens = projected.flatten(2).transpose(1, 2)  # (B, h*w, C)
        token_padding = None if padding is None else padding.flatten(1)  # (B, h*w)
        predictions = []
        for index in range(len(self.layers) + 1):
            weights = None
            if index > 0:
                states, weights = self.layers[index - 1](
                    states, query_positions, tokens, positions, token_padding, need_weights
                )
            if all_layers or index == len(self.layers):
                normed = self.norm(states)
                masks = mask_head(normed, mask_features, anchors)
                predictions.append(LayerPrediction(class_head(normed), masks, normed, weights, anchors, objectness))
        return predictions

    def _start(
        self, mask_features: Tensor, positions: Tensor, memory_shape: torch.Size, anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States and position codes (B, Q, C) of the queries; those of stuff start at zero with a learned code."""
        images, _, height, width = memory_shape
        content = self.content_norm(self.content(at_anchors(mask_features, anchors)))  # (B, Q - S, C)
        scale = anchors.new_tensor([height, width]), anchors.new_tensor(mask_features.shape[-2:])
        places = positions.expand(images, -1, -1).transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)
        anchored = at_anchors(places, anchors * scale[0] // scale[1])  # (B, Q - S, C)
        if self.stuff_queries is None:
            return content, anchored
        stuff = self.stuff_queries.weight.expand(images, -1, -1)  # (B, S, C)
        return torch.cat([torch.zeros_like(stuff), content], 1), torch.cat([stuff, anchored], 1)
