"""Any transformers or timm backbone as `pixel_values -> list of feature maps`, with measured strides.

A pixel decoder needs maps at strides 4, 8, 16 and 32. Backbones that give other strides are refused, or get a pyramid
neck (Li et al. 2022, "Exploring Plain Vision Transformer Backbones", sec. 3); they are never silently used too coarse.
"""

import math

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.resnet.modeling_resnet import ResNetStage
from transformers.utils.import_utils import is_timm_available

from .layers import group_count


if is_timm_available():
    import timm

PYRAMID_STRIDES = (4, 8, 16, 32)


class CheckpointedResNetStage(GradientCheckpointingLayer, ResNetStage):
    """A ResNet stage that can be recomputed in the backward pass; transformers' own cannot."""


class Backbone(nn.Module):
    """Backbone, optional pyramid neck, and what others need to know of it.

    Attributes:
        channels: Channels of each map, fine to coarse.
        strides: Pixels per cell of each map, fine to coarse.
    """

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
        name = getattr(backbone_config, "backbone", None) or backbone_config.model_type
        body_channels = [int(width) for width in self.body.channels]
        body_strides = _measure_strides(self.body, backbone_config, num_channels=num_channels)
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

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> maps (B, C_l, ceil(H / s_l), ceil(W / s_l)), fine to coarse."""
        if self.gradient_checkpointing and self.training and not self.checkpoints_itself:
            maps = self._gradient_checkpointing_func(self._run_body, pixel_values)
        else:
            maps = self._run_body(pixel_values)
        return list(maps) if self.neck is None else self.neck(maps[-1])

    def _run_body(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.body(pixel_values).feature_maps

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self._batch_norms():
                module.eval()
        return self

    def freeze_batch_norm_affine(self) -> None:
        """Stop the gradients of frozen batch norms; called once the weights are in place."""
        for module in self._batch_norms():
            module.requires_grad_(False)

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


def _build_body(backbone_config: PreTrainedConfig) -> nn.Module:
    if backbone_config.model_type == "timm_backbone":
        return _build_timm_body(backbone_config)
    body = AutoBackbone.from_config(backbone_config)
    for module in body.modules():
        if type(module) is ResNetStage:  # same parameters and names, only the class learns to checkpoint
            module.__class__ = CheckpointedResNetStage
    return body


def _build_timm_body(backbone_config: PreTrainedConfig) -> nn.Module:
    """transformers' TimmBackbone; models with a fixed input size are built for any size or refused."""
    if not is_timm_available():
        raise ImportError(f"Backbone timm/{backbone_config.backbone} needs the package timm: pip install timm")
    if backbone_config.backbone not in timm.list_models():
        raise ValueError(f"timm has no model {backbone_config.backbone!r}; see timm.list_models().")
    try:
        return AutoBackbone.from_config(backbone_config)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"timm/{backbone_config.backbone} cannot be used as a backbone: {error}") from error


def _measure_strides(body: nn.Module, backbone_config: PreTrainedConfig, *, num_channels: int) -> list[int]:
    """Strides as timm's feature_info or, for transformers, one forward pass of a zero image on the meta device finds."""
    if backbone_config.model_type == "timm_backbone":
        _refuse_fixed_input_size(body._backbone, backbone_config.backbone)
        return [int(stride) for stride in body._backbone.feature_info.reduction()]
    side = _probe_side(backbone_config)
    with torch.device("meta"), torch.no_grad():
        probe = AutoBackbone.from_config(backbone_config).eval()
        maps = probe(torch.zeros(1, num_channels, side, side)).feature_maps
    return [side // feature_map.shape[-1] for feature_map in maps]


def _probe_side(backbone_config: PreTrainedConfig) -> int:
    """A side that all usual strides and the patch size divide, so that the measured ratio is exact."""
    patch = getattr(backbone_config, "patch_size", None)
    patch = patch if isinstance(patch, int) else 1
    return math.lcm(64, patch)


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
