"""A pixel decoder for real time: context where the map is smallest, separable convolutions where it is large.

Two rules of the light members (PEM, Cavagnero et al., CVPR 2024, sec. 3.3; FastInst, He et al., CVPR 2023, sec. 3.1):
what looks at the whole image does so at 1/32, and nothing wide runs at 1/4. The norms are batch norms, which are
folded into the convolutions for inference (`optimize_for_inference`).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import TransformerEncoderLayer, resize_padding
from .position_encoding import SinePositionEncoding2d


class SeparableConv(nn.Module):
    """A depthwise 3x3 convolution, then a 1x1 convolution that mixes the channels; batch norm and ReLU after each.

    The last of a decoder is `linear`: its 1x1 convolution has a bias instead of norm and ReLU.
    """

    def __init__(self, in_dim: int, out_dim: int, *, linear: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(in_dim)
        self.pointwise = nn.Conv2d(in_dim, out_dim, 1, bias=linear)
        self.pointwise_norm = nn.Identity() if linear else nn.BatchNorm2d(out_dim)
        self.activation = nn.ReLU()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        features = self.activation(self.depthwise_norm(self.depthwise(features)))
        features = self.pointwise_norm(self.pointwise(features))
        return features if self.linear else self.activation(features)


class ProjectionNorm(nn.Module):
    """A 1x1 convolution and batch norm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features))


class LightPixelDecoder(nn.Module):
    """Transformer encoder layers on the coarsest map, then a narrow feature pyramid of separable convolutions.

    The contract is that of every pixel decoder. Its memory is the pyramid's maps at strides 8 and 16 and the encoded
    coarsest map, all `dim` wide. Cells of the coarsest map that are padding are hidden from attention; convolutions do
    not need to know them.
    """

    def __init__(
        self, in_channels: list[int], *, dim: int, mask_dim: int, layers: int, heads: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.input_projection = ProjectionNorm(coarsest, dim)
        self.position_encoding = SinePositionEncoding2d(dim)
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout) for _ in range(layers)
        )
        self.laterals = nn.ModuleList(ProjectionNorm(width, dim) for width in reversed(finer))
        self.outputs = nn.ModuleList(SeparableConv(dim, dim) for _ in finer[1:])
        self.mask_projection = SeparableConv(dim, mask_dim, linear=True)
        self.memory_channels = [dim] * len(finer)

    def forward(self, features: list[Tensor], padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """`features` fine to coarse -> (B, E, H/4, W/4) and maps (B, C, H_l, W_l) at strides 8, 16, 32."""
        merged = self._with_context(features[-1], padding)  # (B, C, H/32, W/32)
        memory = [merged]
        for lateral, output, feature in zip(self.laterals, self.outputs, reversed(features[1:-1]), strict=False):
            merged = output(_add_upsampled(lateral(feature), merged))  # (B, C, H_l, W_l)
            memory.insert(0, merged)
        return self.mask_projection(_add_upsampled(self.laterals[-1](features[0]), merged)), memory

    def _with_context(self, coarsest: Tensor, padding: Tensor | None) -> Tensor:
        projected = self.input_projection(coarsest)
        height, width = projected.shape[-2:]
        padding = resize_padding(padding, (height, width))
        positions = self.position_encoding(height, width, padding=padding, device=projected.device)
        positions = positions.to(projected.dtype)
        states = projected.flatten(2).transpose(1, 2)  # (B, h*w, C)
        for layer in self.layers:
            states = layer(states, positions, None if padding is None else padding.flatten(1))
        return states.transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)


def _add_upsampled(finer: Tensor, coarser: Tensor) -> Tensor:
    return finer + F.interpolate(coarser, size=finer.shape[-2:], mode="nearest")
