"""Sine position encoding of feature maps (Vaswani et al. 2017; normalised 2-D form of DETR, Carion et al. 2020)."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding2d(nn.Module):
    """Fixed sine and cosine codes of the row (first half of the channels) and of the column (second half).

    Coordinates run from 1 to the number of valid rows (columns) and are scaled to (0, 2 pi], so that a padded image
    gets in its valid part the codes of the unpadded one.
    """

    def __init__(self, dim: int, *, temperature: float = 10_000.0, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset  # of the coordinates; -0.5 puts them at the middle of a cell
        self.dim = dim
        self.temperature = temperature

    def forward(self, height: int, width: int, *, padding: Tensor | None, device: torch.device) -> Tensor:
        """Codes (B or 1, H*W, C) in float32; `padding` is (B, H, W), True where a cell is padding."""
        if padding is None:
            rows = torch.arange(1, height + 1, dtype=torch.float32, device=device)[None, :, None].expand(
                1, height, width
            )
            columns = torch.arange(1, width + 1, dtype=torch.float32, device=device)[None, None, :].expand(
                1, height, width
            )
        else:
            valid = (~padding).to(torch.float32)
            rows, columns = valid.cumsum(1), valid.cumsum(2)  # (B, H, W)
        eps, full_turn = 1e-6, 2 * math.pi
        rows = (rows + self.offset) / (rows[:, -1:, :] + eps) * full_turn
        columns = (columns + self.offset) / (columns[:, :, -1:] + eps) * full_turn
        codes = torch.cat([self._encode(rows), self._encode(columns)], dim=-1)  # (B, H, W, C)
        return codes.flatten(1, 2)  # (B, H*W, C)

    def _encode(self, coordinate: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = 2 * torch.div(torch.arange(half, device=coordinate.device), 2, rounding_mode="floor") / half
        phase = coordinate[..., None] / self.temperature**exponent  # (B, H, W, C/2)
        return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)
