"""Mask decoder of Panoptic SegFormer: the masks are made of the attention maps (Li et al., CVPR 2022, sec. 3.3.3).

What a query looks at is where its object lies, so the scores before the softmax are the mask: each head's map of each
level through a small linear layer, the coarser maps brought to the finest, all summed with learned weights.

As the official code has it, and the paper has not: a linear layer and ReLU for each level before the sum, a ReLU
after it and no sigmoid. A value is therefore 0 or more; a pixel belongs to the mask above 0.5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import Attention, FeedForward

NORM_EPS = 1e-6  # official mask_head.py
# The last bias of the masks at the start. From the official uniform one the last ReLU is all but dead (less than 5 %
# of its values above 0, of random scores) in 4 % of layers with 8 heads, from here in 0.3 %; a dead one never learns.
UNDECIDED = 0.5
SURE = 1e-4  # a mask value nearer to 0 or 1 has the logit of this


class LocationPrediction(NamedTuple):
    """What the location decoder hands to its loss: A location layers, T thing and S stuff queries, K_t thing classes.

    Stages are those of a mask decoder: its blocks, then the tail. The last of each is the prediction.
    """

    thing_class_logits: Tensor  # (A, B, T, K_t), thing classes in ascending order
    boxes: Tensor  # (A, B, T, 4)
    stuff_class_logits: Tensor  # (blocks, B, S): whether the class of stuff is in the image
    stuff_masks: Tensor  # (stages, B, S, h, w) values of 0 or more
    thing_masks: Callable[[Tensor], Tensor]  # queries (B, n) int64 -> (stages, B, n, h, w) values of 0 or more
    mask_valid: Tensor | None  # (B, h, w), False in padding
    mask_size: tuple[int, int]  # of the masks that leave the decoder: about twice h and w
    nothing: Tensor  # 0 that depends on what the loss leaves out, so that all parameters get a gradient (for DDP)


class Stages(NamedTuple):
    """What a mask decoder gives: one entry for each block and one for its tail, or for the tail alone."""

    states: list[Tensor]  # (B, Q, C); the tail has no states of its own: the last block's
    values: list[Tensor | None]  # (B, Q, h, w), 0 or more; None where not asked for
    weights: list[Tensor | None]  # (B, heads, Q, L) when asked for

    def part(self, kept: slice) -> "Stages":
        return Stages(self.states[kept], self.values[kept], self.weights[kept])


class AttentionMaskDecoder(nn.Module):
    """Blocks of cross-attention over all levels, each of which gives masks, and a tail that only gives masks."""

    def __init__(self, dim: int, *, levels: int, blocks: int, heads: int, ffn_dim: int, self_attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AttentionMaskBlock(dim, levels=levels, heads=heads, ffn_dim=ffn_dim, self_attention=self_attention)
            for _ in range(blocks)
        )
        self.tail = AttentionMaskTail(dim, levels=levels, heads=heads)

    def forward(
        self,
        states: Tensor,
        positions: Tensor | None,
        memory: Tensor,
        shapes: tuple[tuple[int, int], ...],
        padding: Tensor | None,
        *,
        all_stages: bool,
        all_values: bool = True,
        need_weights: bool = False,
    ) -> Stages:
        """Decode queries (B, Q, C) from memory (B, L, C), its levels one after the other, fine to coarse.

        Args:
            positions: (B, Q, C) added to the states before each block and the tail, or None.
            shapes: Height and width of each level.
            padding: (B, L), True where a cell is padding.
            all_stages: Also give the stages before the last.
            all_values: Give masks for those too.
        """
        stages = Stages([], [], [])
        for block in self.blocks:
            states, values, weights = block(
                states, positions, memory, shapes, padding, all_stages and all_values, all_stages and need_weights
            )
            if all_stages:
                _append(stages, states, values, weights)
        values, weights = self.tail(states, positions, memory, shapes, padding, need_weights)
        _append(stages, states, values, weights)
        return stages

    def reset_published(self) -> None:
        """Xavier for all weights; biases as torch starts them, but for the last one of the masks: see `UNDECIDED`."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init.xavier_uniform_(module.weight)
                bound = module.weight[0].numel() ** -0.5
                assert module.bias is not None
                init.uniform_(module.bias, -bound, bound)
        for module in self.modules():
            if isinstance(module, MasksOfScores):
                assert module.fuse.bias is not None
                init.constant_(module.fuse.bias, UNDECIDED)


class AttentionMaskBlock(GradientCheckpointingLayer):
    """Self-attention where asked for, cross-attention, feed-forward; norm after each residual sum."""

    def __init__(self, dim: int, *, levels: int, heads: int, ffn_dim: int, self_attention: bool) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads=heads, dropout=0.0) if self_attention else None
        self.self_attention_norm = nn.LayerNorm(dim, eps=NORM_EPS) if self_attention else None
        self.cross_attention = ScoredAttention(dim, heads=heads, dropout=0.0)
        self.cross_attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.masks = MasksOfScores(levels=levels, heads=heads)
        self.feed_forward = FeedForward(
            dim, hidden_dim=ffn_dim, dropout=0.0, activation="gelu", activation_dropout=0.0
        )
        self.feed_forward_norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self,
        states: Tensor,
        positions: Tensor | None,
        memory: Tensor,
        shapes: tuple[tuple[int, int], ...],
        padding: Tensor | None,
        need_values: bool,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """States (B, Q, C), mask values (B, Q, h, w) and attention (B, heads, Q, L), the latter where asked for.

        The positions stay in the states that leave: the official code adds them to the residual path.
        """
        states = states if positions is None else states + positions
        if self.self_attention is not None and self.self_attention_norm is not None:
            attended, _ = self.self_attention(states, states, states)
            states = self.self_attention_norm(states + attended)
        values = weights = None
        if need_values or need_weights:
            attended, scores, weights = self.cross_attention.with_scores(states, memory, padding)
            values = self.masks(scores, shapes, padding) if need_values else None
        else:
            attended, _ = self.cross_attention(states, memory, memory, key_padding=padding)
        states = self.cross_attention_norm(states + attended)
        states = self.feed_forward_norm(states + self.feed_forward(states))
        return states, values, weights if need_weights else None


class AttentionMaskTail(GradientCheckpointingLayer):
    """Scores and their masks, without values to attend to: one more stage at the price of half an attention."""

    def __init__(self, dim: int, *, levels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.masks = MasksOfScores(levels=levels, heads=heads)

    def forward(
        self,
        states: Tensor,
        positions: Tensor | None,
        memory: Tensor,
        shapes: tuple[tuple[int, int], ...],
        padding: Tensor | None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mask values (B, Q, h, w) and, if asked for, what attention there would be (B, heads, Q, L)."""
        queries = self.query(states if positions is None else states + positions)
        scores = attention_scores(queries, self.key(memory), heads=self.heads)  # (B, heads, Q, L)
        return self.masks(scores, shapes, padding), _weights(scores, padding) if need_weights else None


class ScoredAttention(Attention):
    """Attention that also gives its scores before the softmax."""

    def with_scores(self, query: Tensor, memory: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attended values (B, Q, C); scores and weights (B, heads, Q, L). The scores know of no padding."""
        scores = attention_scores(self.query(query), self.key(memory), heads=self.heads)
        weights = _weights(scores, padding)
        value = self.value(memory).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)
        return self.output((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)), scores, weights


class MasksOfScores(nn.Module):
    """Attention scores of all levels and heads to one mask for each query.

    The published layer weighs the concatenation of all levels' maps after upsampling. Both are linear, so here the
    maps are weighed first and one map for each level is upsampled, not one for each head: same numbers, less work.
    """

    def __init__(self, *, levels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.by_level = nn.ModuleList(nn.Conv2d(heads, heads, kernel_size=1) for _ in range(levels))
        self.fuse = nn.Conv2d(levels * heads, 1, kernel_size=1)

    def forward(self, scores: Tensor, shapes: Sequence[tuple[int, int]], padding: Tensor | None) -> Tensor:
        """(B, heads, Q, L) scores -> (B, Q, h, w) values of 0 or more at the first level, 0 in padding."""
        cells = [height * width for height, width in shapes]
        parts = scores.split(cells, dim=-1)  # (B, heads, Q, h_l * w_l) each
        valids = [None] * len(cells) if padding is None else _level_valids(padding, shapes)
        share = self.fuse.weight.split(self.heads, dim=1)  # (1, heads, 1, 1) each
        total = None
        for level, shape in enumerate(shapes):
            weighed = F.conv2d(F.relu(self.by_level[level](parts[level])), share[level])  # (B, 1, Q, h_l * w_l)
            values = raise_resolution(weighed[:, 0].unflatten(-1, shape), valids[level], shapes[0])  # (B, Q, h, w)
            total = values if total is None else total + values
        assert total is not None
        assert self.fuse.bias is not None
        values = F.relu(total + self.fuse.bias.to(total.dtype))
        return values if valids[0] is None else values * valids[0][:, None]


def attention_scores(query: Tensor, key: Tensor, *, heads: int) -> Tensor:
    """Scaled dot products (B, heads, Q, L) of (B, Q, C) and (B, L, C)."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    key = key.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)


def raise_resolution(values: Tensor, valid: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling of (B, Q, h, w) to `size`, in float32 at least; what stands in padding is not mixed in.

    `valid` (B, h, w) is False in padding. A cell beside the border takes what the valid ones weigh there, as at the
    border of an unpadded image; one without a valid neighbour is 0.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    same = values.shape[-2:] == size
    if valid is None:
        return values if same else F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    values = values.masked_fill(~valid[:, None], 0.0)
    if same:
        return values
    weight = F.interpolate(valid[:, None].to(values.dtype), size=size, mode="bilinear", align_corners=False)
    values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return values / torch.where(weight > 0, weight, 1.0)


def logits_of_values(values: Tensor) -> Tensor:
    """Mask values of 0 or more as logits of a probability: 0.5 becomes 0, 0 and 1 the logits of 1e-4 and 1 - 1e-4."""
    return torch.logit(values, eps=SURE)


def _level_valids(padding: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B, L) padding of all levels -> a (B, h_l, w_l) map of the valid cells for each."""
    parts = (~padding).split([height * width for height, width in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _weights(scores: Tensor, padding: Tensor | None) -> Tensor:
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    return scores.softmax(-1)


def _append(stages: Stages, states: Tensor, values: Tensor | None, weights: Tensor | None) -> None:
    stages.states.append(states)
    stages.values.append(values)
    stages.weights.append(weights)
