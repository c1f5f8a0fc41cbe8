"""Any transformers or timm backbone as `pixel_values -> list of feature maps`, with measured strides.

A pixel decoder needs maps at strides 4, 8, 16 and 32. Backbones that give other strides are refused, or get a pyramid
neck (Li et al. 2022, "Exploring Plain Vision Transformer Backbones", sec. 3); they are never silently used too coarse.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.resnet.modeling_resnet import ResNetStage
from transformers.models.swin.modeling_swin import SwinLayer, SwinPatchEmbeddings, SwinStage
from transformers.utils.import_utils import is_timm_available

from .backbone_swin import (
    FlatSwinPatchEmbeddings,
    GatheringSwinLayer,
    ViewingSwinStage,
    can_be_read_past,
    swin_feature_maps,
)
from .layers import group_count

if is_timm_available():
    import timm

PYRAMID_STRIDES = (4, 8, 16, 32)


class CheckpointedResNetStage(GradientCheckpointingLayer, ResNetStage):
    """A ResNet stage that can be recomputed in the backward pass; transformers' own cannot."""


# Of transformers' modules -> what takes their place.
BETTER_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    ResNetStage: CheckpointedResNetStage,
    SwinLayer: GatheringSwinLayer,
    SwinPatchEmbeddings: FlatSwinPatchEmbeddings,
    SwinStage: ViewingSwinStage,
}


class Backbone(nn.Module):
    """Backbone, optional pyramid neck, and what others need to know of it.

    Attributes:
        channels: Channels of each map, fine to coarse.
        strides: Pixels per cell of each map, fine to coarse.
    """

    body: Any  # a PreTrainedModel of transformers, which is untyped
    _gradient_checkpointing_func: Any  # set by transformers when checkpointing is switched on

    def __init__(
        self,
        backbone_config: PreTrainedConfig,
        *,
        neck: str,
        neck_dim: int,
        freeze_batch_norm: bool,
        num_channels: int,
    ) -> None:
        super().__init__()
        self.body = _build_body(backbone_config)
        self.freeze_batch_norm = freeze_batch_norm
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = checkpoint  # replaced when checkpointing is switched on
        name = getattr(backbone_config, "backbone", None) or backbone_config.model_type
        body_channels = [int(width) for width in self.body.channels]
        probe = _Probe(backbone_config, num_channels=num_channels)
        body_strides = probe.strides()
        wants_neck = neck == "pyramid" or (neck == "auto" and _is_single_stride(body_strides))
        if wants_neck and not _is_single_stride(body_strides):
            raise ValueError(
                f"backbone_neck 'pyramid' needs one common stride; {name} has the strides {body_strides}."
            )
        self.neck = PyramidNeck(body_channels[-1], neck_dim, stride=body_strides[-1]) if wants_neck else None
        self.channels = [neck_dim] * len(PYRAMID_STRIDES) if wants_neck else body_channels
        self.strides = list(PYRAMID_STRIDES) if wants_neck else body_strides
        if tuple(self.strides) != PYRAMID_STRIDES:
            raise ValueError(
                f"Backbone {name} gives maps with strides {self.strides}; needed are {list(PYRAMID_STRIDES)}. Choose "
                "other out_features / out_indices, or backbone_neck='pyramid' for a backbone with a single stride."
            )
        # Unpadded patches (ConvNeXt, ViT) drop the remainder of an image that they do not divide: pad it first.
        self.pad_multiple = body_strides[-1] if probe.drops_remainder() else 1
        self.idle_parameters = probe.idle_parameters(last_map_only=wants_neck)
        self.freeze()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> maps (B, C_l, ceil(H / s_l), ceil(W / s_l)), fine to coarse."""
        height, width = pixel_values.shape[-2:]
        if self.pad_multiple > 1:
            pixel_values = F.pad(pixel_values, (0, -width % self.pad_multiple, 0, -height % self.pad_multiple))
        # Nothing of a frozen backbone is kept for the backward pass, so there is nothing to compute again.
        trained = any(parameter.requires_grad for parameter in self.parameters())
        checkpointing = self.gradient_checkpointing and self.training and trained
        if checkpointing and not pixel_values.requires_grad:
            # Reentrant checkpointing gives no gradients to a block none of whose inputs asks for them.
            pixel_values = pixel_values.detach().requires_grad_()
        if checkpointing and not self.checkpoints_itself:
            maps = self._gradient_checkpointing_func(self._run_body, pixel_values)
        else:
            maps = self._run_body(pixel_values)
        maps = list(maps) if self.neck is None else self.neck(maps[-1])
        if self.pad_multiple == 1:
            return maps
        sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.strides]
        return [feature_map[..., :rows, :columns] for feature_map, (rows, columns) in zip(maps, sizes, strict=True)]

    def _run_body(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        if can_be_read_past(self.body):
            return swin_feature_maps(self.body, pixel_values)
        return self.body(pixel_values).feature_maps

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        self.freeze()
        return self

    def freeze(self) -> None:
        """Keep frozen batch norms in eval mode, and them and idle parameters without gradient.

        Runs at construction and again with every `train()` and `eval()`, because loading a checkpoint replaces the
        parameters and with them the mark. Idle parameters (a last norm of Swin, DINOv2's mask token) are those that no
        used map depends on: DistributedDataParallel would wait for their gradients in vain.
        """
        for name in self.idle_parameters:
            self.body.get_parameter(name).requires_grad_(False)
        if self.freeze_batch_norm:
            for module in self._batch_norms():
                module.eval().requires_grad_(False)

    def freeze_batch_norm_affine(self) -> None:
        """Stop the gradients of frozen batch norms; called once the weights are in place."""
        self.freeze()

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    @property
    def timm_model(self) -> nn.Module | None:
        """The timm model inside transformers' TimmBackbone, which has its own checkpointing switch."""
        return self.body._backbone if self.body.config.model_type == "timm_backbone" else None

    @property
    def checkpoints_itself(self) -> bool:
        """Whether parts of the body recompute their own activations; otherwise the body is recomputed as a whole."""
        return self.timm_model is not None or any(
            isinstance(m, GradientCheckpointingLayer) for m in self.body.modules()
        )


class PyramidNeck(nn.Module):
    """Four maps at strides 4 to 32 from the last map of a plain (single-stride) backbone."""

    def __init__(self, in_dim: int, out_dim: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.levels = nn.ModuleList(_pyramid_level(in_dim, out_dim, stride=stride, target=t) for t in PYRAMID_STRIDES)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, C, H/s, W/s) -> four maps (B, E, H/4, W/4) to (B, E, H/32, W/32)."""
        height, width = (side * self.stride for side in features.shape[-2:])
        maps = []
        for level, target in zip(self.levels, PYRAMID_STRIDES, strict=True):
            size = (math.ceil(height / target), math.ceil(width / target))
            level_map = level(features)
            if level_map.shape[-2:] != size:  # strides such as 14 are no power of two times the target
                level_map = nn.functional.interpolate(level_map, size=size, mode="bilinear", align_corners=False)
            maps.append(level_map)
        return maps


def _pyramid_level(in_dim: int, out_dim: int, *, stride: int, target: int) -> nn.Sequential:
    """Transposed convolutions towards finer, max pooling towards coarser strides, then 1x1 and 3x3."""
    steps: list[nn.Module] = []
    doublings = round(math.log2(stride / target))
    for index in range(max(0, doublings)):
        steps.append(nn.ConvTranspose2d(in_dim, in_dim, kernel_size=2, stride=2))
        if index + 1 < doublings:
            steps += [nn.GroupNorm(1, in_dim), nn.GELU()]
    steps += [nn.MaxPool2d(kernel_size=2, stride=2) for _ in range(max(0, -doublings))]
    groups = group_count(out_dim)
    steps += [nn.Conv2d(in_dim, out_dim, 1, bias=False), nn.GroupNorm(groups, out_dim)]
    steps += [nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False), nn.GroupNorm(groups, out_dim)]
    return nn.Sequential(*steps)


def _build_body(backbone_config: PreTrainedConfig) -> Any:
    if backbone_config.model_type == "timm_backbone":
        return _build_timm_body(backbone_config)
    body = AutoBackbone.from_config(backbone_config)
    for module in body.modules():  # same parameters, names and results
        module.__class__ = BETTER_CLASSES.get(type(module), type(module))
    return body


def _build_timm_body(backbone_config: PreTrainedConfig) -> nn.Module:
    """transformers' TimmBackbone; models with a fixed input size are built for any size or refused."""
    if not is_timm_available():
        raise ImportError(f"Backbone timm/{backbone_config.backbone} needs the package timm: pip install timm")
    if not timm.is_model(backbone_config.backbone):
        raise ValueError(f"timm has no model {backbone_config.backbone!r}; see timm.list_models().")
    try:
        body = AutoBackbone.from_config(backbone_config)
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        raise ValueError(f"timm/{backbone_config.backbone} cannot be used as a backbone: {error}") from error
    _refuse_fixed_input_size(body._backbone, backbone_config.backbone)
    return body


class _Probe:
    """A zero image through a second copy of the body on the meta device: no memory, no arithmetic."""

    def __init__(self, backbone_config: PreTrainedConfig, *, num_channels: int) -> None:
        self.side = _probe_side(backbone_config)  # one pixel more than strides and patches divide
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            self.body: Any = _build_body(backbone_config).eval().requires_grad_(True)
            self.maps = self.body(torch.zeros(1, num_channels, self.side, self.side)).feature_maps

    def strides(self) -> list[int]:
        """Pixels per cell of each map."""
        whole = self.side - 1
        cells = [feature_map.shape[-1] for feature_map in self.maps]
        return [whole // count if whole % count == 0 else whole // (count - 1) for count in cells]

    def drops_remainder(self) -> bool:
        """Whether the odd pixel at the end of the image gets no cell of its own in some map."""
        return any((self.side - 1) % feature_map.shape[-1] == 0 for feature_map in self.maps)

    def idle_parameters(self, *, last_map_only: bool) -> list[str]:
        """Names of the parameters that do not take part in the maps (or in the last one)."""
        waiting = [feature_map.grad_fn for feature_map in (self.maps[-1:] if last_map_only else self.maps)]
        seen, used = set(waiting), set()
        while waiting:  # the autograd graph, from the maps back to the parameters
            node = waiting.pop()
            if hasattr(node, "variable"):
                used.add(id(node.variable))
            following = {edge for edge, _ in node.next_functions if edge is not None} - seen
            seen |= following
            waiting.extend(following)
        return [name for name, parameter in self.body.named_parameters() if id(parameter) not in used]


def _probe_side(backbone_config: PreTrainedConfig) -> int:
    """One more than a multiple of all usual strides and of the patch size; a whole map has at least 4 cells then."""
    patch = getattr(backbone_config, "patch_size", None)
    return math.lcm(256, patch if isinstance(patch, int) else 1) + 1


def _refuse_fixed_input_size(timm_model: nn.Module, name: str) -> None:
    for module in timm_model.modules():
        fixed = getattr(module, "strict_img_size", False) and getattr(module, "img_size", None)
        if fixed:
            raise ValueError(
                f"timm/{name} takes images of {tuple(fixed)} only; use a backbone of any input size (for Swin and ViT "
                "the transformers versions)."
            )


def _is_single_stride(strides: list[int]) -> bool:
    return len(set(strides)) == 1
