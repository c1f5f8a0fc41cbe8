"""Pixel decoders around an encoder of multi-scale deformable attention.

`DeformablePixelDecoder` is Mask2Former's (Cheng et al., CVPR 2022, sec. 3.2.2 and appendix; official
`MSDeformAttnPixelDecoder`): the maps at strides 8, 16 and 32 attend to each other, one pyramid step adds stride 4.
`DeformableMemory` is Panoptic SegFormer's (Li et al., CVPR 2022, sec. 3.2): a further map at stride 64 and no
per-pixel embedding, because its masks are attention maps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .deformable_attention import DeformableAttention, Shapes, cell_centres
from .layers import ConvNormActivation, FeedForward, resize_padding
from .position_encoding import SinePositionEncoding2d

ENCODED_LEVELS = 3  # the backbone's maps at strides 8, 16 and 32


class DeformableEncoderLayer(GradientCheckpointingLayer):
    """Post-norm layer in which every cell reads a few points of every level."""

    def __init__(self, dim: int, *, heads: int, ffn_dim: int, points: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = DeformableAttention(dim, heads=heads, levels=levels, points=points)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(
            dim, hidden_dim=ffn_dim, dropout=dropout, activation="relu", activation_dropout=dropout
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self, states: Tensor, positions: Tensor, references: Tensor, shapes: Shapes, padding: Tensor | None
    ) -> Tensor:
        """`states` (B, S, C), `positions` (B or 1, S, C), `references` (1, S, 2), `padding` (B, S)."""
        attended = self.self_attention(states + positions, references, states, shapes, padding)
        states = self.self_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        return self.feed_forward_norm(states + self.feed_forward(states))


class DeformableMemory(nn.Module):
    """Maps of one width that have looked at each other; this is all that Panoptic SegFormer's pixel decoder does.

    The coarsest of `further_levels` maps come from strided convolutions on the one before, the first of them on the
    backbone's coarsest map. A learned code tells the levels apart.
    """

    def __init__(
        self,
        in_channels: list[int],
        *,
        dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        points: int,
        dropout: float,
        further_levels: int = 1,
        position_offset: float = -0.5,
    ) -> None:
        super().__init__()
        encoded = in_channels[-ENCODED_LEVELS:]
        levels = len(encoded) + further_levels
        # From coarse to fine, as the published weights number their levels.
        self.input_projections = nn.ModuleList(
            ConvNormActivation(width, dim, kernel_size=1, activation=False, bias=True) for width in reversed(encoded)
        )
        self.further_projections = nn.ModuleList(
            ConvNormActivation(
                dim if index else encoded[-1], dim, kernel_size=3, activation=False, bias=True, stride=2
            )
            for index in range(further_levels)
        )
        self.level_codes = nn.Embedding(levels, dim)
        self.position_encoding = SinePositionEncoding2d(dim, offset=position_offset)
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, heads=heads, ffn_dim=ffn_dim, points=points, levels=levels, dropout=dropout)
            for _ in range(layers)
        )
        self.memory_channels = [dim] * levels

    def forward(self, features: list[Tensor], padding: Tensor | None) -> tuple[Tensor | None, list[Tensor]]:
        """No per-pixel embedding, and the encoded maps (B, C, H_l, W_l), fine to coarse."""
        return None, self.encode(features, padding)

    def encode(self, features: list[Tensor], padding: Tensor | None) -> list[Tensor]:
        """`features` of the backbone, fine to coarse; `padding` (B, H, W) is neither read nor looked from."""
        maps = self._project(features)  # coarse to fine
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        states = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)  # (B, S, C)
        paddings = [resize_padding(padding, shape) for shape in shapes]
        codes = []
        for level, (shape, level_padding) in enumerate(zip(shapes, paddings, strict=True)):
            places = self.position_encoding(*shape, padding=level_padding, device=states.device)  # (B or 1, h*w, C)
            codes.append(places.to(states.dtype) + self.level_codes.weight[level])
        positions = torch.cat(codes, 1)  # (B or 1, S, C)
        flat_padding = (
            None if padding is None else torch.cat([part.flatten(1) for part in paddings if part is not None], 1)
        )
        references = cell_centres(shapes, device=states.device)
        for layer in self.layers:
            states = layer(states, positions, references, shapes, flat_padding)
        parts = states.split([height * width for height, width in shapes], dim=1)
        encoded = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        return encoded[::-1]

    def _project(self, features: list[Tensor]) -> list[Tensor]:
        projections = zip(self.input_projections, reversed(features[-ENCODED_LEVELS:]), strict=True)
        maps = [projection(feature) for projection, feature in projections]
        coarser = features[-1]
        for projection in self.further_projections:
            coarser = projection(coarser)
            maps.insert(0, coarser)
        return maps


class DeformablePixelDecoder(DeformableMemory):
    """The encoder, and one pyramid step to the per-pixel embedding at stride 4."""

    def __init__(
        self,
        in_channels: list[int],
        *,
        dim: int,
        mask_dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        points: int,
        dropout: float,
    ) -> None:
        sizes = {"layers": layers, "heads": heads, "ffn_dim": ffn_dim, "points": points, "dropout": dropout}
        super().__init__(in_channels, dim=dim, further_levels=0, position_offset=0.0, **sizes)  # type: ignore[arg-type]
        self.lateral = ConvNormActivation(in_channels[0], dim, kernel_size=1, activation=False)
        self.output = ConvNormActivation(dim, dim, kernel_size=3)
        self.mask_projection = nn.Conv2d(dim, mask_dim, kernel_size=1)

    def forward(self, features: list[Tensor], padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Per-pixel embedding (B, E, H/4, W/4) and the encoded maps at strides 8, 16, 32."""
        memory = self.encode(features, padding)
        lateral = self.lateral(features[0])  # (B, C, H/4, W/4)
        finest = memory[0].contiguous()  # tokens lie channel by channel, which is slow to interpolate
        upsampled = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(self.output(lateral + upsampled)), memory
