"""Query decoder of Panoptic SegFormer (Li et al., CVPR 2022, sec. 3.3): things by their place, stuff by its class.

- Things: learned queries go through Deformable DETR's decoder, which refines a box layer by layer and predicts thing
  classes (the location decoder); then through a mask decoder without self-attention.
- Stuff: one learned query for each class skips the location decoder and goes through a mask decoder of its own; it
  only says whether its class is there.

Masks come from attention maps over all levels but the coarsest, see `attention_masks`. The order of the queries is
things first, then stuff query j for the j-th class of stuff.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_masks import AttentionMaskDecoder, LocationPrediction, Stages, logits_of_values, raise_resolution
from .boxes import refine_boxes
from .deformable_attention import DeformableAttention
from .layers import MLP, Attention, FeedForward, resize_padding
from .query_decoder_standard import LayerPrediction

IMPOSSIBLE = -20.0  # logit of a class that a query cannot have
PRIOR = 0.01  # of each class at the start (Lin et al. 2017)
BOX_LAYERS = 3  # linear layers of a box predictor
FIRST_BOX_SIZE = -2.0  # logit of the first layer's widths and heights at the start: 12 % of the canvas


class LocationDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among thing queries, deformable attention around their boxes, feed-forward; post-norm."""

    def __init__(
        self,
        dim: int,
        *,
        levels: int,
        points: int,
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
        self.cross_attention = DeformableAttention(dim, heads=heads, levels=levels, points=points)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(
            dim, hidden_dim=ffn_dim, dropout=dropout, activation=activation, activation_dropout=activation_dropout
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        states: Tensor,
        positions: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: tuple[tuple[int, int], ...],
        padding: Tensor | None = None,
    ) -> Tensor:
        """`states`, `positions` (B, Q, C), `references` (B, Q, 2 or 4), `memory` (B, S, C), `padding` (B, S)."""
        located = states + positions
        attended, _ = self.self_attention(located, located, states)
        states = self.self_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        attended = self.cross_attention(states + positions, references, memory, shapes, padding)
        states = self.cross_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        return self.feed_forward_norm(states + self.feed_forward(states))


class _Memory(NamedTuple):
    tokens: Tensor  # (B, S, C)
    shapes: tuple[tuple[int, int], ...]
    padding: Tensor | None  # (B, S)

    def without_coarsest(self) -> "_Memory":
        kept = sum(height * width for height, width in self.shapes[:-1])
        padding = None if self.padding is None else self.padding[:, :kept]
        return _Memory(self.tokens[:, :kept], self.shapes[:-1], padding)


class _Things(NamedTuple):
    class_logits: list[Tensor]  # (B, T, K_t) of each location layer that is predicted from
    boxes: list[Tensor]  # (B, T, 4)
    states: Tensor  # (B, T, C) after the last location layer


class LocationQueryDecoder(nn.Module):
    """Location decoder and two mask decoders, with their own class, box and mask predictors.

    There are `num_thing_queries` + (classes of stuff) queries. Without a class of things there are no thing queries,
    whatever their number.
    """

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
        points: int,
        num_thing_queries: int,
        num_labels: int,
        thing_label_ids: Sequence[int],
        thing_mask_layers: int,
        stuff_mask_layers: int,
    ) -> None:
        super().__init__()
        if len(memory_channels) < 2:
            raise ValueError(f"The location decoder needs 2 or more levels of memory, got {len(memory_channels)}.")
        self.dim = dim
        self.num_labels = num_labels
        self.thing_labels = sorted(set(thing_label_ids))
        self.stuff_labels = [label for label in range(num_labels) if label not in set(thing_label_ids)]
        self.num_thing_queries = num_thing_queries if self.thing_labels else 0
        self.num_queries = self.num_thing_queries + len(self.stuff_labels)
        self.input_projections = nn.ModuleList(
            nn.Conv2d(width, dim, kernel_size=1) if width != dim else nn.Identity() for width in memory_channels
        )
        levels = len(memory_channels)
        mask_decoder = partial(AttentionMaskDecoder, dim, levels=levels - 1, heads=heads, ffn_dim=4 * dim)
        if self.num_thing_queries:
            self.thing_queries = nn.Embedding(num_thing_queries, 2 * dim)  # position code, then content
            self.reference_points = nn.Linear(dim, 2)
            sizes: dict[str, Any] = {"levels": levels, "points": points, "heads": heads, "ffn_dim": ffn_dim}
            rates: dict[str, Any] = {"dropout": dropout, "attention_dropout": attention_dropout}
            rates["activation_dropout"] = activation_dropout
            self.layers = nn.ModuleList(
                LocationDecoderLayer(dim, **sizes, **rates, activation=activation) for _ in range(layers)
            )
            self.class_predictors = nn.ModuleList(nn.Linear(dim, len(self.thing_labels)) for _ in range(layers))
            self.box_predictors = nn.ModuleList(MLP(dim, dim, 4, layers=BOX_LAYERS) for _ in range(layers))
            self.thing_masks = mask_decoder(blocks=thing_mask_layers, self_attention=False)
        if self.stuff_labels:
            self.stuff_queries = nn.Embedding(len(self.stuff_labels), 2 * dim)  # content, then position code
            self.stuff_predictors = nn.ModuleList(nn.Linear(dim, 1) for _ in range(stuff_mask_layers))
            self.stuff_masks = mask_decoder(blocks=stuff_mask_layers, self_attention=True)
        known = len(self.thing_labels)
        of_things = {label: position for position, label in enumerate(self.thing_labels)}
        columns = [*(of_things.get(label, known) for label in range(num_labels)), known + 1]
        own = [[label == own_label for label in range(num_labels)] for own_label in self.stuff_labels]
        # Moved when used, not buffers: transformers fills buffers that are in no checkpoint with nothing.
        self._thing_columns = torch.tensor(columns, device="cpu")  # (K + 1,)
        self._own_columns = torch.tensor(own, dtype=torch.bool, device="cpu").view(-1, num_labels)  # (S, K)

    def forward(
        self,
        memory: list[Tensor],
        mask_features: Tensor | None,
        padding: Tensor | None,
        *,
        class_head: Callable[..., Tensor] | None = None,
        mask_head: Callable[..., Tensor] | None = None,
        all_layers: bool,
        need_weights: bool = False,
        full_masks: bool = True,
        mask_size: tuple[int, int] | None = None,
    ) -> list[LayerPrediction]:
        """As `StandardQueryDecoder`; the last prediction carries what `LocationCriterion` reads as `location`.

        One prediction for each stage of the deeper mask decoder (its blocks and its tail). The stages are aligned at
        the last; before its first one the other decoder repeats it. Thing classes are those of the last location
        layer, stuff classes those of the stage.

        Args:
            memory: Maps (B, C_l, H_l, W_l), fine to coarse. Things are looked for in all, masks made of all but one.
            mask_features: Not used, as the heads: this decoder has predictors of its own.
            padding: (B, H, W), True in padding: never attended to, and without a mask.
            all_layers: Predict from every stage, not from the last alone.
            full_masks: If False, the loss makes the masks that it needs: earlier stages have None, and the last one's
                thing masks carry no gradient.
            mask_size: Height and width of the masks; None: twice those of the finest map.
        """
        levels = self._flatten(memory, padding)
        coarse = levels.without_coarsest()
        height, width = coarse.shapes[0]
        size = mask_size or (2 * height, 2 * width)
        valid = None if coarse.padding is None else ~coarse.padding[:, : height * width].unflatten(1, (height, width))
        # In training nothing is left out: every parameter is to get a gradient, if only zero.
        every = all_layers or self.training
        kept = slice(None) if all_layers else slice(-1, None)
        things = self._locate(levels, all_layers=every)
        stuff = self._stuff_stages(coarse, all_layers=every, need_weights=need_weights)
        stuff_classes = self._stuff_classes(stuff)
        unused = [] if all_layers else [*things.class_logits, *things.boxes, *stuff_classes, *stuff.values]
        stuff, stuff_classes = stuff.part(kept), stuff_classes[kept]
        with nullcontext() if full_masks else torch.no_grad():
            options: dict[str, Any] = {"all_stages": all_layers, "need_weights": need_weights}
            thing = self._thing_stages(things.states, coarse, all_values=full_masks, **options)
        thing_classes = [things.class_logits[-1]] * len(thing.states)
        predictions = self._assemble(thing, thing_classes, stuff, stuff_classes, valid, size, full_masks=full_masks)
        location = LocationPrediction(
            thing_class_logits=torch.stack(things.class_logits[kept]),
            boxes=torch.stack(things.boxes[kept]),
            stuff_class_logits=torch.stack(stuff_classes[: len(stuff_classes) - 1 or 1]),
            stuff_masks=_stack(stuff.values),
            thing_masks=partial(self._masks_of_things, things.states, coarse, all_layers),
            mask_valid=valid,
            mask_size=size,
            nothing=_zero_of(unused, levels.tokens),
        )
        return [*predictions[:-1], predictions[-1]._replace(location=location)]

    # --- the three decoders ------------------------------------------------------------------------------------------

    def _flatten(self, memory: list[Tensor], padding: Tensor | None) -> _Memory:
        maps = [project(level) for project, level in zip(self.input_projections, memory, strict=True)]
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in maps)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)  # (B, S, C)
        if padding is None:
            return _Memory(tokens, shapes, None)
        by_level = [resize_padding(padding, shape) for shape in shapes]
        token_padding = torch.cat([level.flatten(1) for level in by_level if level is not None], 1)  # (B, S)
        return _Memory(tokens, shapes, token_padding)

    def _locate(self, memory: _Memory, *, all_layers: bool) -> _Things:
        """Location decoder; box l starts from box l - 1, through which no gradient flows."""
        images = memory.tokens.shape[0]
        if not self.num_thing_queries:
            none = memory.tokens.new_zeros((images, 0, self.dim))
            return _Things([none[..., :0]], [none[..., :4].float()], none)
        positions, states = self.thing_queries.weight.expand(images, -1, -1).chunk(2, dim=-1)  # (B, T, C) each
        references = _at_least_float32(self.reference_points(positions)).sigmoid()  # (B, T, 2)
        classes, boxes = [], []
        for index, layer in enumerate(self.layers):
            states = layer(states, positions, references, memory.tokens, memory.shapes, memory.padding)
            refined = refine_boxes(references, _at_least_float32(self.box_predictors[index](states)))  # (B, T, 4)
            if all_layers or index == len(self.layers) - 1:
                classes.append(self.class_predictors[index](states))
                boxes.append(refined)
            references = refined.detach()
        return _Things(classes, boxes, states)

    def _thing_stages(self, states: Tensor, memory: _Memory, **options: Any) -> Stages:
        if not self.num_thing_queries:
            return _no_stages(states, memory)
        return self.thing_masks(states, None, *memory, **options)

    def _stuff_stages(self, memory: _Memory, *, all_layers: bool, need_weights: bool) -> Stages:
        images = memory.tokens.shape[0]
        if not self.stuff_labels:
            return _no_stages(memory.tokens.new_zeros((images, 0, self.dim)), memory)
        states, positions = self.stuff_queries.weight.expand(images, -1, -1).chunk(2, dim=-1)  # (B, S, C) each
        return self.stuff_masks(states, positions, *memory, all_stages=all_layers, need_weights=need_weights)

    def _masks_of_things(self, states: Tensor, memory: _Memory, all_layers: bool, queries: Tensor) -> Tensor:
        """Mask values (stages, B, n, h, w) of the thing queries (B, n); no query's mask depends on another query."""
        chosen = states.gather(1, queries[..., None].expand(-1, -1, states.shape[-1]))  # (B, n, C)
        values = _stack(self._thing_stages(chosen, memory, all_stages=all_layers or self.training).values)
        return values if all_layers else values[-1:] + values[:-1].sum() * 0

    def _stuff_classes(self, stages: Stages) -> list[Tensor]:
        """Logits (B, S) of each stage; those of the tail are the last block's."""
        if not self.stuff_labels:
            return [states[..., 0] for states in stages.states]
        last = len(self.stuff_predictors) - 1
        first = last + 2 - len(stages.states)  # the stage that the first given one is
        return [
            self.stuff_predictors[min(first + index, last)](states)[..., 0]
            for index, states in enumerate(stages.states)
        ]

    # --- predictions -------------------------------------------------------------------------------------------------

    def _assemble(
        self,
        things: Stages,
        thing_classes: list[Tensor],
        stuff: Stages,
        stuff_classes: list[Tensor],
        valid: Tensor | None,
        size: tuple[int, int],
        *,
        full_masks: bool,
    ) -> list[LayerPrediction]:
        """Join the stages of both decoders, last with last."""
        count = max(len(things.states), len(stuff.states))
        predictions = []
        for back in range(count, 0, -1):
            i, j = max(len(things.states) - back, 0), max(len(stuff.states) - back, 0)
            weights = [part for part in (things.weights[i], stuff.weights[j]) if part is not None]
            logits = None
            first, second = things.values[i], stuff.values[j]
            if (full_masks or back == 1) and first is not None and second is not None:
                values = torch.cat([first, second], 1)  # (B, Q, h, w)
                logits = logits_of_values(raise_resolution(values, valid, size))  # (B, Q, H/4, W/4)
            predictions.append(
                LayerPrediction(
                    self._class_logits(thing_classes[i], stuff_classes[j]),
                    logits,
                    torch.cat([things.states[i], stuff.states[j]], 1),
                    torch.cat(weights, 2) if weights else None,
                )
            )
        return predictions

    def _class_logits(self, things: Tensor, stuff: Tensor) -> Tensor:
        """(B, T, K_t) and (B, S) -> (B, Q, K + 1): what a query cannot be has a low logit, the last column is 0."""
        impossible = things.new_full((*things.shape[:2], 1), IMPOSSIBLE)
        table = torch.cat([things, impossible, torch.zeros_like(impossible)], -1)  # (B, T, K_t + 2)
        thing_rows = table.index_select(-1, self._thing_columns.to(table.device))  # (B, T, K + 1)
        stuff = stuff[..., None]  # (B, S, 1)
        stuff_rows = torch.where(self._own_columns.to(stuff.device), stuff, IMPOSSIBLE)  # (B, S, K)
        return torch.cat([thing_rows, torch.cat([stuff_rows, torch.zeros_like(stuff)], -1)], 1)

    def reset_published(self) -> None:
        """The official start, over what `initialize` gives to the parts; deformable attention keeps its own."""
        for module in self.modules():
            if isinstance(module, AttentionMaskDecoder):
                module.reset_published()
        if self.num_thing_queries:
            init.normal_(self.thing_queries.weight)
            init.xavier_uniform_(self.reference_points.weight)
            init.zeros_(self.reference_points.bias)
            for classes in self.class_predictors:
                init.constant_(classes.bias, math.log(PRIOR / (1 - PRIOR)))
            for index, boxes in enumerate(self.box_predictors):
                last = boxes.get_submodule(f"layers.{BOX_LAYERS - 1}")
                size = FIRST_BOX_SIZE if index == 0 else 0.0
                init.zeros_(last.weight)
                init.copy_(last.bias, torch.tensor([0.0, 0.0, size, size]))
        if self.stuff_labels:
            init.normal_(self.stuff_queries.weight)
            for predictor in self.stuff_predictors:
                init.constant_(predictor.bias, math.log(PRIOR / (1 - PRIOR)))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _stack(values: list[Tensor | None]) -> Tensor:
    return torch.stack([part for part in values if part is not None])


def _zero_of(parts: list[Tensor | None], like: Tensor) -> Tensor:
    """0 that depends on all parts."""
    sums = [_at_least_float32(part).sum() for part in parts if part is not None]
    return torch.stack(sums).sum() * 0 if sums else _at_least_float32(like.new_zeros(()))


def _no_stages(states: Tensor, memory: _Memory) -> Stages:
    """One stage without a query (B, 0, C)."""
    height, width = memory.shapes[0]
    values = _at_least_float32(states.new_zeros((states.shape[0], 0, height, width)))
    return Stages([states], [values], [None])
