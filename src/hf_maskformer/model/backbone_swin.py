"""Swin layers that do transformers' arithmetic with fewer and smaller copies where no gradients are asked for.

Parameters, their names and the results are those of transformers' `SwinLayer` (Liu et al., ICCV 2021); only the class
of the modules changes. Padding to whole windows, the cyclic shift and the cut into windows are one gather, and so is
the way back. Norm, projections and attention of some windows follow one another before the next windows are read: what
they hand on stays in the cache, and no map but the layer's result is written as a whole.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import (
    SwinBackbone,
    SwinEncoder,
    SwinLayer,
    SwinModel,
    SwinPatchEmbeddings,
    SwinStage,
)

from .layers import ROWS_AT_ONCE, is_plain

FLOATS_AT_ONCE = 2**18  # of the windows that are projected together; a GPU takes all


class ViewingSwinStage(SwinStage):
    """A Swin stage whose map is a view of its tokens, not a copy with the channels in front."""

    def get_reshaped_hidden_states(
        self,
        hidden_states: Tensor,
        hidden_states_before_downsampling: Tensor,
        height: int,
        width: int,
        output_hidden_states_before_downsampling: bool,
    ) -> Tensor:
        """(B, C, H, W) of the tokens (B, H * W, C) before downsampling, which is all that a backbone asks for."""
        if not output_hidden_states_before_downsampling:
            return super().get_reshaped_hidden_states(
                hidden_states,
                hidden_states_before_downsampling,
                height,
                width,
                output_hidden_states_before_downsampling,
            )
        return hidden_states_before_downsampling.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def can_be_read_past(body: Any) -> bool:
    """Whether it is a Swin backbone whose outer modules do nothing but call the inner ones."""
    return is_plain(body, SwinBackbone) and is_plain(body.swin, SwinModel) and is_plain(body.swin.encoder, SwinEncoder)


def swin_feature_maps(backbone: SwinBackbone, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """The maps of transformers' SwinBackbone, each a view (B, C, H, W) of normed tokens.

    A function, not another class: transformers knows by the class how official checkpoints are read.
    """
    tokens, size = backbone.swin.embeddings(pixel_values)
    found = {backbone.stage_names[0]: tokens.unflatten(1, size).permute(0, 3, 1, 2)}
    for name, stage in zip(backbone.stage_names[1:], backbone.swin.encoder.layers, strict=True):
        tokens, found[name], _ = stage(
            tokens, size, always_partition=True, output_hidden_states_before_downsampling=True
        )
        size = tuple((side + 1) // 2 for side in size)
    maps = []
    for stage in backbone.out_features:
        tokens = found[stage].permute(0, 2, 3, 1)  # (B, H, W, C)
        maps.append(backbone.hidden_states_norms[stage](tokens).permute(0, 3, 1, 2))
    return tuple(maps)


class FlatSwinPatchEmbeddings(SwinPatchEmbeddings):
    """Patches as rows of a matrix product: the tokens are written in their order, not copied into it."""

    def forward(self, pixel_values: Tensor | None) -> Any:
        """(B, C, H, W) pixels to tokens (B, h * w, D), and (h, w)."""
        plain = is_plain(self.projection, nn.Conv2d) and not torch.compiler.is_compiling()
        if pixel_values is None or pixel_values.device.type != "cpu" or not plain:
            return super().forward(pixel_values)
        pixels = self.maybe_pad(pixel_values, *pixel_values.shape[-2:])
        high, wide = self.patch_size
        patches = pixels.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        tokens = F.linear(patches.flatten(3), self.projection.weight.flatten(1), self.projection.bias)
        return tokens.flatten(1, 2), tuple(tokens.shape[1:3])


class GatheringSwinLayer(SwinLayer):
    """One Swin layer. With gradients, in training or in a compiled graph it is transformers' own."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> Any:
        """`hidden_states` (B, H * W, C); returns them and None in place of the attention weights."""
        wants_weights = kwargs.get("output_attentions") or self.attention.config._attn_implementation != "sdpa"
        training = self.training or self.dropout.training or self.drop_path.training or torch.is_grad_enabled()
        traced = torch.compiler.is_compiling() or type(hidden_states) is not Tensor or hidden_states.is_meta
        plain = all(is_plain(projection, nn.Linear) for projection in self._projections())
        if training or traced or wants_weights or not plain:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        states = self._attend(hidden_states, input_dimensions)
        rows = states.view(-1, states.shape[-1])
        for part in rows.split(ROWS_AT_ONCE if rows.device.type == "cpu" else len(rows)):
            part += self.mlp(self.layernorm_after(part))
        return states, None

    def get_attn_mask(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """transformers' mask, 0 or -100, with minus infinity for -100.

        exp(-100) is a denormal number, with which a CPU multiplies ten times as slowly. Cells of the padding, whose
        values are the bias alone, 0 at the start of a training, hand nothing but such numbers to the projection.
        """
        mask = super().get_attn_mask(height, width, dtype, device)
        return mask if mask is None else mask.masked_fill(mask != 0, -torch.inf)

    def _projections(self) -> list[Any]:
        return [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]

    def _attend(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        """States (B, H * W, C) plus window attention of the normed ones; new memory."""
        channels = states.shape[-1]
        attention = self.attention
        area = self.window_size**2
        padded = [-(-side // self.window_size) * self.window_size for side in size]
        bias = attention.relative_position_bias()  # (1, heads, area, area)
        shifted = self.get_attn_mask(padded[0], padded[1], states.dtype, states.device)  # (windows, area, area)
        weight = torch.cat([projection.weight for projection in self._projections()])
        offset = None
        if attention.q_proj.bias is not None:
            offset = torch.cat([projection.bias for projection in self._projections()])
        at_once, images_at_once = 0, len(states)
        if states.device.type == "cpu":
            at_once = max(1, FLOATS_AT_ONCE // (area * channels))
            images_at_once = max(1, at_once * area // (padded[0] * padded[1]))
        heads = (3, attention.num_attention_heads, attention.head_dim)
        result = torch.empty_like(states)
        for images, attended in zip(states.split(images_at_once), result.split(images_at_once), strict=True):
            count = len(images)
            for part in window_parts(size, self.window_size, self.shift_size, at_once, states.device):
                before = images.index_select(1, part.cells)  # (count, cells, C)
                projected = F.linear(self.layernorm_before(before), weight, offset)  # (count, cells, 3 C)
                if part.places is not None:  # what is padding has the value 0 after the norm
                    full = projected.new_zeros((count, part.windows * area, 3 * channels))
                    if offset is not None:
                        full += offset
                    projected = full.index_copy_(1, part.places, projected)
                query, key, value = projected.view(count * part.windows, area, *heads).permute(2, 0, 3, 1, 4)
                mask = bias
                if shifted is not None:
                    mask = (bias + shifted[part.first : part.first + part.windows, None]).repeat(count, 1, 1, 1)
                found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
                found = found.transpose(1, 2).reshape(count, -1, channels)
                if part.places is not None:
                    found = found.index_select(1, part.places)
                attended.index_copy_(1, part.cells, before + attention.o_proj(found))  # autocast: of two types
        return result


@dataclass(frozen=True)
class WindowPart:
    """Windows that follow one another, and their cells.

    Attributes:
        first, windows: number of the first window, and how many there are.
        cells: (n,) the cells of the map in them, in the windows' order; padding is left out.
        places: (n,) where each stands among all places of the windows; None if none is padding.
    """

    first: int
    windows: int
    cells: Tensor
    places: Tensor | None


@functools.lru_cache(maxsize=64)
def window_parts(
    size: tuple[int, int], window: int, shift: int, at_once: int, device: torch.device
) -> tuple[WindowPart, ...]:
    """The shifted windows of an (H, W) map, `at_once` in a part; 0: all in one."""
    order = window_order(size, window, shift)
    parts = []
    for start in range(0, len(order), at_once or len(order)):
        chosen = order[start : start + at_once] if at_once else order
        places = (chosen.flatten() < size[0] * size[1]).nonzero()[:, 0]
        cells = chosen.flatten()[places].to(device)
        parts.append(
            WindowPart(start, len(chosen), cells, None if len(cells) == chosen.numel() else places.to(device))
        )
    return tuple(parts)


def window_order(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """The cell of an (H, W) map at each place of its shifted windows: (windows, window**2), H * W for padding."""
    height, width = size
    rows = torch.arange(-(-height // window) * window, device="cpu")
    columns = torch.arange(-(-width // window) * window, device="cpu")
    # The map rolled by -shift holds at place i the cell i + shift, counted around.
    row = (rows + shift) % len(rows)
    column = (columns + shift) % len(columns)
    cell = row[:, None] * width + column
    cell = torch.where((row[:, None] < height) & (column < width), cell, height * width)
    return cell.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
