"""Initial weights of every part that the published code initialises in its own way."""

from torch import nn
from transformers import initialization as init

from .class_head import LinearClassHead
from .layers import MLP, Attention, ConvNormActivation, FeedForward
from .mask_head import LocatedDotProductMaskHead
from .pixel_decoder_fpn import FpnPixelDecoder, TransformerFpnPixelDecoder
from .query_decoder_standard import StandardQueryDecoder


def initialize(module: nn.Module) -> None:
    """As the official MaskFormer code initialises (detectron2's c2_xavier_fill, DETR's xavier)."""
    if isinstance(module, ConvNormActivation):
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
    elif isinstance(module, FpnPixelDecoder):
        _initialize_projection(module.mask_projection)
        if isinstance(module, TransformerFpnPixelDecoder):
            _initialize_projection(module.input_projection)
    elif isinstance(module, LocatedDotProductMaskHead):
        init.xavier_uniform_(module.place.weight)
        init.zeros_(module.place.bias)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose2d | nn.Conv2d) and not getattr(module, "_is_hf_initialized", False):
        _initialize_projection(module)


def _initialize_projection(projection: nn.Conv2d | nn.ConvTranspose2d) -> None:
    init.kaiming_uniform_(projection.weight, a=1)
    if projection.bias is not None:
        init.zeros_(projection.bias)
