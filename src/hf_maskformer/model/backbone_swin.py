"""Swin layers that do transformers' arithmetic with fewer and smaller copies where no gradients are asked for.

Parameters, their names and the results are those of transformers' `SwinLayer` (Liu et al., ICCV 2021); only the class
of the modules changes. Padding to whole windows, the cyclic shift and the cut into windows are one gather, and so is
the way back. Padded cells are all alike, so they are projected once instead of one by one (with windows of 7 they are
a fifth of the cells of a 32x32 map, and 42 % of those of a 16x16 one).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.swin.modeling_swin import SwinLayer, SwinMLP

from .layers import in_rows


class RowwiseSwinMLP(SwinMLP):
    """The feed-forward part, a few rows at a time."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return in_rows(super().forward, hidden_states)


class GatheringSwinLayer(SwinLayer):
    """One Swin layer. With gradients or in a compiled graph it is transformers' own."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> Any:
        """`hidden_states` (B, H * W, C); returns them and None in place of the attention weights."""
        wants_weights = kwargs.get("output_attentions") or self.attention.config._attn_implementation != "sdpa"
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or wants_weights:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        states = self.drop_path(self.dropout(self._attend(self.layernorm_before(hidden_states), input_dimensions)))
        states += hidden_states
        return self.dropout(self.mlp(self.layernorm_after(states))).add_(states), None

    def _attend(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        """Window attention of normed states (B, H * W, C)."""
        images, _, channels = states.shape
        attention = self.attention
        padded = [-(-side // self.window_size) * self.window_size for side in size]
        to_windows, from_windows = window_order(size, self.window_size, self.shift_size, device=states.device)
        if padded != list(size):
            states = F.pad(states, (0, 0, 0, 1))  # the last row stands for all padded cells
        area = self.window_size**2
        heads = (-1, area, attention.num_attention_heads, attention.head_dim)
        query, key, value = (
            projection(states).index_select(1, to_windows).view(heads).transpose(1, 2)  # (B * windows, heads, area, d)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        bias = attention.relative_position_bias()  # (1, heads, area, area)
        shifted = self.get_attn_mask(*padded, dtype=states.dtype, device=states.device)  # (windows, area, area)
        if shifted is not None:
            bias = (bias + shifted[:, None]).repeat(images, 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
        attended = attended.transpose(1, 2).reshape(images, -1, channels)  # (B, windows * area, C)
        return attention.o_proj(attended.index_select(1, from_windows))  # (B, H * W, C)


def window_order(size: tuple[int, int], window: int, shift: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which cell of an (H, W) map stands at each place of its shifted windows, and where each cell went.

    The first is (windows * window**2,), H * W for padding; the second is (H * W,).
    """
    height, width = size
    rows = torch.arange(-(-height // window) * window, device=device)
    columns = torch.arange(-(-width // window) * window, device=device)
    # The map rolled by -shift holds at place i the cell i + shift, counted around.
    row = (rows + shift) % len(rows)
    column = (columns + shift) % len(columns)
    cell = row[:, None] * width + column
    cell = torch.where((row[:, None] < height) & (column < width), cell, height * width)
    cell = cell.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten()
    place = torch.empty(height * width + 1, dtype=torch.int64, device=device)
    place[cell] = torch.arange(len(cell), device=device)
    return cell, place[:-1]
