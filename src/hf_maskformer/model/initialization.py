"""Initial weights of every part that the published code initialises in its own way."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .class_head import LinearClassHead
from .deformable_attention import DeformableAttention
from .layers import MLP, Attention, ConvNormActivation, FeedForward
from .mask_head import AnchoredDotProductMaskHead, LocatedDotProductMaskHead
from .objectness import PRIOR, ObjectnessHead
from .pixel_decoder_deformable import DeformableMemory, DeformablePixelDecoder
from .pixel_decoder_fpn import FpnPixelDecoder, TransformerFpnPixelDecoder
from .query_decoder_anchored import AnchoredQueryDecoder
from .query_decoder_location import LocationQueryDecoder
from .query_decoder_masked import MaskedQueryDecoder
from .query_decoder_standard import StandardQueryDecoder

TORCH_MODULES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)


def initialize(module: nn.Module, scheme: str = "published") -> None:
    """As the official MaskFormer code initialises (detectron2's c2_xavier_fill, DETR's xavier), or as torch does.

    What anchors, boxes and sampling points start from is the same in both. Tensors that a checkpoint filled are left
    alone, if this is called through transformers' `initialize_weights`.
    """
    if isinstance(module, DeformableAttention):
        _initialize_deformable(module)
    elif isinstance(module, nn.BatchNorm2d):
        _initialize_batch_norm(module)
    elif isinstance(module, LocationQueryDecoder):  # its parts have been here before
        module.reset_published()
    elif scheme == "torch" and not isinstance(module, ObjectnessHead | AnchoredDotProductMaskHead):
        if isinstance(module, TORCH_MODULES):
            module.reset_parameters()
    elif isinstance(module, ConvNormActivation):
        init.kaiming_uniform_(module.conv.weight, a=1)
    elif isinstance(module, Attention | FeedForward | MLP | LinearClassHead):
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                init.xavier_uniform_(linear.weight)
                init.zeros_(linear.bias)
    elif isinstance(module, StandardQueryDecoder):
        init.normal_(module.query_positions.weight)
        if isinstance(module.input_projection, nn.Conv2d):
            _initialize_projection(module.input_projection)
    elif isinstance(module, DeformableMemory):
        init.normal_(module.level_codes.weight)
        for projection in (*module.input_projections, *module.further_projections):
            init.xavier_uniform_(projection.conv.weight)
            init.zeros_(projection.conv.bias)
        if isinstance(module, DeformablePixelDecoder):
            _initialize_projection(module.mask_projection)
    elif isinstance(module, MaskedQueryDecoder):
        for table in (module.level_codes, module.query_features, module.query_positions):
            init.normal_(table.weight)
        for projection in module.input_projections:
            if isinstance(projection, nn.Conv2d):
                _initialize_projection(projection)
    elif isinstance(module, FpnPixelDecoder):
        _initialize_projection(module.mask_projection)
        if isinstance(module, TransformerFpnPixelDecoder):
            _initialize_projection(module.input_projection)
    elif isinstance(module, LocatedDotProductMaskHead):
        init.xavier_uniform_(module.place.weight)
        init.zeros_(module.place.bias)
    elif isinstance(module, AnchoredQueryDecoder):
        if module.stuff_queries is not None:
            init.normal_(module.stuff_queries.weight)
        if isinstance(module.input_projection, nn.Conv2d):
            _initialize_projection(module.input_projection)
    elif isinstance(module, ObjectnessHead):
        _initialize_projection(module.hidden)
        init.normal_(module.output.weight, std=0.01)
        init.constant_(module.output.bias, math.log(PRIOR / (1 - PRIOR)))
    elif isinstance(module, AnchoredDotProductMaskHead):
        # Every query starts as the same disc, about 56 pixels wide: softplus(1) r^2 = 1 at its border.
        init.normal_(module.place.weight, std=0.01)
        init.copy_(module.place.bias, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]))
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose2d | nn.Conv2d) and not getattr(module, "_is_hf_initialized", False):
        _initialize_projection(module)


def _initialize_deformable(module: DeformableAttention) -> None:
    """Equal weights at fixed directions, whatever the query (Deformable DETR, appendix A.4)."""
    for linear in (module.value, module.output):
        init.xavier_uniform_(linear.weight)
        init.zeros_(linear.bias)
    for linear in (module.sampling_offsets, module.attention_weights):
        init.zeros_(linear.weight)
    init.zeros_(module.attention_weights.bias)
    init.copy_(module.sampling_offsets.bias, module.initial_offsets())


def _initialize_batch_norm(module: nn.BatchNorm2d) -> None:
    for ones in (module.weight, module.running_var):
        init.ones_(ones)
    for zeros in (module.bias, module.running_mean, module.num_batches_tracked):
        init.zeros_(zeros)


def _initialize_projection(projection: nn.Conv2d | nn.ConvTranspose2d) -> None:
    init.kaiming_uniform_(projection.weight, a=1)
    if projection.bias is not None:
        init.zeros_(projection.bias)
