"""What the models return, at the Hugging Face border: names and shapes that the pipeline and post-processing read."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class HfMaskFormerModelOutput(ModelOutput):
    """Last layer's predictions and what they were made from.

    Args:
        class_queries_logits: (B, Q, K + 1), the last column is "no object".
        masks_queries_logits: (B, Q, ceil(H/4), ceil(W/4)).
        valid_extent: (B, 2) share of the padded height and width that is image; None without `pixel_mask`.
        last_hidden_state: (B, Q, C) query states.
        mask_features: (B, E, H/4, W/4) per-pixel embedding, only with `output_hidden_states`.
        hidden_states: Query states (B, Q, C) of every layer, when asked for.
        attentions: Cross-attention (B, heads, Q, L) of every layer, when asked for.
    """

    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    valid_extent: Tensor | None = None
    last_hidden_state: Tensor | None = None
    mask_features: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HfMaskFormerForUniversalSegmentationOutput(ModelOutput):
    """Predictions and, with labels, the loss; ready for the image processor's post-processing.

    Args:
        loss: Weighted sum of `loss_dict`, when labels are given.
        loss_dict: Unweighted terms summed over the supervised layers.
        layer_losses: Of the terms that every layer has, the share of each supervised layer, (L,) detached; their sum
            stands in `loss_dict`. For logs.
        class_queries_logits: (B, Q, K + 1), the last column is "no object".
        masks_queries_logits: (B, Q, ceil(H/4), ceil(W/4)) logits.
        valid_extent: (B, 2) share of the padded height and width that is image; None without `pixel_mask`.
        auxiliary_logits: Earlier layers' `class_queries_logits` and `masks_queries_logits`, with
            `output_auxiliary_logits=True`.
        hidden_states: Query states (B, Q, C) of every layer, when asked for.
        attentions: Cross-attention (B, heads, Q, L) of every layer, when asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    layer_losses: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    valid_extent: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def valid_extent(pixel_mask: Tensor | None) -> Tensor | None:
    """Share of the padded height and width that is image, (B, 2); the image is in the top left corner."""
    if pixel_mask is None:
        return None
    valid = pixel_mask != 0
    rows = valid.any(dim=2).float().mean(dim=1)
    columns = valid.any(dim=1).float().mean(dim=1)
    return torch.stack([rows, columns], dim=1)
