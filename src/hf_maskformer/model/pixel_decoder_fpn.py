"""MaskFormer's pixel decoders (sec. 3.3, appendix; official `BasePixelDecoder`, `TransformerEncoderPixelDecoder`).

Contract of every pixel decoder:
`features, padding -> (mask_features (B, E, H/4, W/4), memory: list of (B, C, H_l, W_l))`.
The published code makes the per-pixel embedding with a 3x3 convolution (the paper says 1x1); we follow the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNormActivation, TransformerEncoderLayer, resize_padding
from .position_encoding import SinePositionEncoding2d


class FpnPixelDecoder(nn.Module):
    """Feature pyramid: the coarsest map is upsampled step by step and summed with the projected finer maps.

    The memory handed to the query decoder ends with the backbone's coarsest map itself, the published choice; before
    it stand the pyramid's merged maps at strides 8 and 16, for decoders that look at small objects.
    """

    def __init__(self, in_channels: list[int], *, dim: int, mask_dim: int) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.stem = ConvNormActivation(coarsest, dim, kernel_size=3)
        self.laterals = nn.ModuleList(
            ConvNormActivation(width, dim, kernel_size=1, activation=False) for width in reversed(finer)
        )
        self.outputs = nn.ModuleList(ConvNormActivation(dim, dim, kernel_size=3) for _ in finer)
        self.mask_projection = nn.Conv2d(dim, mask_dim, kernel_size=3, padding=1)
        self.memory_channels = [dim, dim, coarsest]

    def forward(
        self, features: list[Tensor], padding: Tensor | None, *, project: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """`features` fine to coarse; `padding` (B, H, W) of the image is not needed by convolutions.

        With `project` False the first result is what `mask_projection` would make the embedding of.
        """
        return self._merge(features, features[-1], project=project)

    def _merge(self, features: list[Tensor], coarsest: Tensor, *, project: bool) -> tuple[Tensor, list[Tensor]]:
        merged = self.stem(coarsest)
        memory = [coarsest]
        for lateral, output, feature in zip(self.laterals, self.outputs, reversed(features[:-1]), strict=True):
            merged = output(_add_upsampled(lateral(feature), merged))  # (B, C, H_l, W_l)
            memory.insert(0, merged)
        # (B, E, H/4, W/4), strides 8, 16, 32
        return self.mask_projection(merged) if project else merged, memory[1:]


def _add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """Fine map (B, C, H, W), which may be overwritten, plus the coarse one resized to it (nearest)."""
    height, width = coarse.shape[-2:]
    doubled = tuple(fine.shape[-2:]) == (2 * height, 2 * width)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not doubled:
        return fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
    fine.unflatten(3, (width, 2)).unflatten(2, (height, 2)).add_(coarse[:, :, :, None, :, None])
    return fine


class TransformerFpnPixelDecoder(FpnPixelDecoder):
    """A DETR encoder on the coarsest map before the pyramid; its output is also the query decoder's memory."""

    def __init__(
        self, in_channels: list[int], *, dim: int, mask_dim: int, layers: int, heads: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__([*in_channels[:-1], dim], dim=dim, mask_dim=mask_dim)
        self.input_projection = nn.Conv2d(in_channels[-1], dim, kernel_size=1)
        self.position_encoding = SinePositionEncoding2d(dim)
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout) for _ in range(layers)
        )

    def forward(
        self, features: list[Tensor], padding: Tensor | None, *, project: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """As in the base class; attention ignores the cells of the coarsest map that `padding` (B, H, W) marks."""
        projected = self.input_projection(features[-1])  # (B, C, h, w)
        height, width = projected.shape[-2:]
        padding = resize_padding(padding, (height, width))
        positions = self.position_encoding(height, width, padding=padding, device=projected.device)
        positions = positions.to(projected.dtype)
        states = projected.flatten(2).transpose(1, 2)  # (B, h*w, C)
        for layer in self.layers:
            states = layer(states, positions, None if padding is None else padding.flatten(1))
        encoded = states.transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)
        return self._merge(features, encoded, project=project)
