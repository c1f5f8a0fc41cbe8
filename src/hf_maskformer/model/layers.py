"""Building blocks that several parts share: attention, feed-forward, transformer layers, convolution + norm, MLP."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
ROWS_AT_ONCE = 1024  # of a feed-forward layer without gradients


class Attention(nn.Module):
    """Multi-head attention whose queries and keys may carry position codes; values never do (DETR)."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding: Tensor | None = None,
        blocked: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`query` (B, Q, C), `key` and `value` (B, L, C), `key_padding` (B, L) True where a key is padding.

        `blocked` (B, Q, L) is True where a query must not look; each query needs at least one key to look at.
        Returns the attended values (B, Q, C) and, if asked for, the attention weights (B, heads, Q, L).
        """
        q = self._split(self.query(query))
        k = self._split(self.key(key))
        v = self._split(self.value(value))
        mask = None if key_padding is None else ~key_padding[:, None, None, :]  # (B, 1, 1, L), True = may attend
        if blocked is not None:
            open_keys = ~blocked[:, None]  # (B, 1, Q, L)
            mask = open_keys if mask is None else mask & open_keys
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, Q, L)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.softmax(-1)
            attended = F.dropout(weights, dropout) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        attended = attended.transpose(1, 2).flatten(2)  # (B, Q, C)
        return self.output(attended), weights

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them and dropout after each."""

    def __init__(
        self, dim: int, *, hidden_dim: int, dropout: float, activation: str, activation_dropout: float
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, dim)
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = dropout
        self.activation_dropout = activation_dropout

    def forward(self, states: Tensor) -> Tensor:
        return in_rows(self._forward_rows, states)

    def _forward_rows(self, states: Tensor) -> Tensor:
        states = F.dropout(self.activation(self.expand(states)), self.activation_dropout, self.training)
        return F.dropout(self.contract(states), self.dropout, self.training)


def in_rows(layer: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Apply a layer that treats all rows of (..., C) alike; without gradients on a CPU, `ROWS_AT_ONCE` at a time.

    The wide tensor between two linear layers then stays in the cache, and its memory is used again for the next rows;
    as a whole it would be fresh memory from the system, which has to be cleared, in every call.
    """
    split = states.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not split or states.numel() <= ROWS_AT_ONCE * states.shape[-1]:
        return layer(states)
    return torch.cat([layer(rows) for rows in states.flatten(0, -2).split(ROWS_AT_ONCE)]).view(states.shape)


class TransformerEncoderLayer(GradientCheckpointingLayer):
    """Post-norm self-attention layer of DETR; position codes are added to queries and keys."""

    def __init__(self, dim: int, *, heads: int, ffn_dim: int, dropout: float, activation: str = "relu") -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads=heads, dropout=dropout)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(
            dim, hidden_dim=ffn_dim, dropout=dropout, activation=activation, activation_dropout=dropout
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, states: Tensor, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        """`states` (B, L, C), `positions` (B or 1, L, C), `padding` (B, L); returns (B, L, C)."""
        located = states + positions
        attended, _ = self.self_attention(located, located, states, key_padding=padding)
        states = self.self_attention_norm(states + F.dropout(attended, self.dropout, self.training))
        return self.feed_forward_norm(states + self.feed_forward(states))


class ConvNormActivation(nn.Module):
    """Convolution, group norm and, unless switched off, ReLU; without a bias unless asked for."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel_size: int,
        activation: bool = True,
        bias: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)
        self.norm = nn.GroupNorm(group_count(out_dim), out_dim)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()
        self.pointwise = kernel_size == stride == 1
        self.channels_first = True  # not where `optimize_for_inference` lays maps out the other way

    def forward(self, features: Tensor) -> Tensor:
        """`features` (B, C, H, W); maps of a backbone of tokens are views whose channels lie together."""
        if not (self.channels_first and _has_channels_last(features)):
            features = self.conv(features)
        elif self.pointwise and is_plain(self.conv, nn.Conv2d):
            features = pointwise(self.conv, features)
        else:
            features = self.conv(features.contiguous())
        return self.activation(self.norm(features))


def pointwise(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product, which reads (B, C, H, W) as they lie and writes row by row.

    A convolution of a map whose channels lie together would copy it first, or write the same order, which the next
    norm and 3x3 convolution are slow with.
    """
    weight = conv.weight.flatten(1).expand(len(features), -1, -1)
    product = torch.bmm(weight, features.flatten(2))  # (B, C', H * W)
    if conv.bias is not None:
        product = product + conv.bias[:, None].to(product.dtype)  # of autocast
    return product.unflatten(2, features.shape[2:])


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does no more than its class says, so that its weights may be used in its place.

    Adapters (PEFT), quantization, sharding and offloading replace the module, its class, its forward or its weights'
    type, or hang hooks on it.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own_weights = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    return type(module) is kind and not any(hooks) and "forward" not in vars(module) and own_weights


def _has_channels_last(features: Tensor) -> bool:
    on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and features.stride(1) == 1 and features.shape[1] > 1


class MLP(nn.Module):
    """Linear layers with ReLU between them, none after the last."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            states = F.relu(layer(states))
        return self.layers[-1](states)


def group_count(dim: int, most: int = 32) -> int:
    """Groups of a group norm: 32 as published, the largest divisor of `dim` below that for narrow models."""
    return next(groups for groups in range(min(most, dim), 0, -1) if dim % groups == 0)


def resize_padding(padding: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """Padding (B, H, W) at the resolution of a feature map; a cell is padding when its first pixel is."""
    if padding is None:
        return None
    return F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
