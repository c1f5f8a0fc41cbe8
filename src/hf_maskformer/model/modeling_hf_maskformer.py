"""`HfMaskFormerModel` and `HfMaskFormerForUniversalSegmentation`: parts by contract, put together in `assembly.py`.

Contracts between the parts (letters: B batch, Q queries, N segments, C channels, E embedding, K classes):
    backbone:       pixel_values -> list of (B, C_l, H/s_l, W/s_l), fine to coarse
    pixel decoder:  features, padding -> (mask_features (B, E, H/4, W/4), memory: list of (B, C, H_l, W_l))
    query decoder:  memory, mask_features, padding, heads -> list of per-layer predictions, first to last
    class head:     (B, Q, C) -> (B, Q, K + 1), the last column is "no object"
    mask head:      (B, Q, C), (B, E, H, W), anchors (B, Q, 2) or None -> (B, Q, H, W) logits
    criterion:      predictions per layer, targets -> (loss, loss_dict, layer_losses)
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from .assembly import (
    build_backbone,
    build_class_head,
    build_criterion,
    build_mask_head,
    build_pixel_decoder,
    build_query_decoder,
)
from .backbone import Backbone
from .configuration_hf_maskformer import HfMaskFormerConfig
from .criterion import loss_normalizer
from .inference_optimization import optimize
from .initialization import initialize
from .input_checks import check_inputs, check_targets, refuse_unknown_arguments
from .location_criterion import LocationCriterion
from .mask_head import masks_by_convolution
from .official import load_official, official_source, save_official
from .outputs import HfMaskFormerForUniversalSegmentationOutput, HfMaskFormerModelOutput, valid_extent
from .point_criterion import PointCriterion
from .query_decoder_standard import LayerPrediction


class HfMaskFormerPreTrainedModel(PreTrainedModel):
    """Loading (our own and official checkpoints), initialisation and gradient checkpointing of both models."""

    config_class = HfMaskFormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _optimized_for_inference = False
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = [
        "StandardQueryDecoderLayer",
        "MaskedQueryDecoderLayer",
        "LocationDecoderLayer",
        "AttentionMaskBlock",
        "AttentionMaskTail",
        "TransformerEncoderLayer",
        "DeformableEncoderLayer",
        "CheckpointedResNetStage",
    ]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint of ours or an official `maskformer` one; safetensors only, no pickle is ever opened.

        Raises:
            ValueError: Another model type, or weights that exist only as a pickle (`pytorch_model.bin`).
        """
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        official_config = official_source(pretrained_model_name_or_path, **kwargs)
        if official_config is not None:
            return load_official(cls, pretrained_model_name_or_path, official_config, config=config, **kwargs)
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, or transformers passes over every module without parameters of its own, which `initialize` needs."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config.initialization)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            timm_model: Any = module.timm_model if isinstance(module, Backbone) else None
            if timm_model is not None:
                timm_model.set_grad_checkpointing(enable)

    def optimize_for_inference(self, *, dtype: torch.dtype | None = None, channels_last: bool = False) -> Any:
        """Make this model faster and able to predict only; returns it.

        Batch norms are folded into the convolutions before them, which changes predictions by rounding alone. The
        model is in eval mode then, without gradients, and can be neither trained nor saved: keep the original.

        Args:
            dtype: `torch.bfloat16` or `torch.float16` for weights and arithmetic; None: as they are.
            channels_last: Lay out images with their channels innermost, which suits convolutions in half precision on
                a GPU; on a CPU it gained nothing in float32.
        """
        if not self._optimized_for_inference:
            optimize(self.eval(), dtype=dtype, channels_last=channels_last)
            for module in self.modules():
                if isinstance(module, HfMaskFormerPreTrainedModel):
                    module._optimized_for_inference = True
        return self

    def train(self, mode: bool = True) -> Any:
        """As torch's.

        Raises:
            RuntimeError: The model was optimized for inference.
        """
        if mode and self._optimized_for_inference:
            raise RuntimeError("This model was optimized for inference and cannot be trained; load it again.")
        return super().train(mode)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **kwargs: Any) -> None:
        """As transformers'.

        Raises:
            RuntimeError: The model was optimized for inference; its weights have no checkpoint's names any more.
        """
        if self._optimized_for_inference:
            raise RuntimeError("This model was optimized for inference and cannot be saved; save the original.")
        super().save_pretrained(save_directory, *arguments, **kwargs)

    def save_official(self, save_directory: str | Path, *, image_processor: Any = None) -> None:
        """Write model and preprocessor files that plain transformers loads.

        Args:
            save_directory: Created if missing.
            image_processor: An `HfMaskFormerImageProcessor`; its settings go into preprocessor_config.json.

        Raises:
            ValueError: A part has no counterpart in the official format; the message names it.
        """
        save_official(self, save_directory, image_processor=image_processor)


class HfMaskFormerModel(HfMaskFormerPreTrainedModel):
    """Backbone, pixel decoder, query decoder and heads: `pixel_values` to classes and masks of N queries."""

    # The auxiliary per-pixel classifier of a training checkpoint has no place here.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^pixel_classifier\."]

    def __init__(self, config: HfMaskFormerConfig) -> None:
        super().__init__(config)
        config.validate_consistency()
        self.backbone = build_backbone(config)
        self.pixel_decoder = build_pixel_decoder(config, self.backbone.channels)
        self.query_decoder = build_query_decoder(config, self.pixel_decoder.memory_channels)
        self.class_head = build_class_head(config)
        self.mask_head = build_mask_head(config)
        self.post_init()
        if config.backbone_freeze_batch_norm:
            self.backbone.freeze_batch_norm_affine()

    def predict(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        *,
        all_layers: bool,
        need_weights: bool = False,
        full_masks: bool = True,
        keep_features: bool = True,
    ) -> tuple[list[LayerPrediction], Tensor]:
        """Predictions of all layers (or of the last) and the per-pixel embedding (B, E, H/4, W/4).

        With `full_masks` False a decoder whose masks the loss makes itself leaves out those of the earlier layers;
        with `keep_features` False the embedding may never be made, and the second result is of no use.
        """
        check_inputs(pixel_values, pixel_mask, num_channels=self.config.num_channels)
        padding = None if pixel_mask is None else pixel_mask == 0
        features = self.backbone(pixel_values.to(self.dtype))
        decoder: Any = self.pixel_decoder
        mask_head: Any = self.mask_head
        by_kernels = not keep_features and not all_layers and self._projects_by_kernels()
        mask_features, memory = decoder(features, padding, **({"project": False} if by_kernels else {}))
        if by_kernels:
            mask_head = partial(masks_by_convolution, head=mask_head, projection=decoder.mask_projection)
        predictions = self.query_decoder(
            memory,
            mask_features,
            padding,
            class_head=self.class_head,
            mask_head=mask_head,
            all_layers=all_layers,
            need_weights=need_weights,
            **self._further_decoder_arguments(pixel_values, full_masks=full_masks),
        )
        return predictions, mask_features

    def _projects_by_kernels(self) -> bool:
        """Whether one prediction's masks are cheaper without the per-pixel embedding, see `masks_by_convolution`."""
        parts = (self.config.pixel_decoder[:3], self.config.query_decoder, self.config.mask_head)
        fits = parts == ("fpn", "standard", "dot_product") and self.config.num_queries < self.config.mask_dim
        return fits and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _further_decoder_arguments(self, pixel_values: Tensor, *, full_masks: bool) -> dict[str, Any]:
        """What only some query decoders ask for."""
        if self.config.query_decoder == "location":
            height, width = pixel_values.shape[-2:]
            return {"full_masks": full_masks, "mask_size": ((height + 3) // 4, (width + 3) // 4)}
        return {"full_masks": full_masks} if self.config.query_decoder == "masked" else {}

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HfMaskFormerModelOutput | tuple:
        """`pixel_values` (B, C, H, W); `pixel_mask` (B, H, W), 0 in padding."""
        refuse_unknown_arguments(kwargs)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        predictions, mask_features = self.predict(
            pixel_values,
            pixel_mask,
            all_layers=bool(hidden or weights),
            need_weights=bool(weights),
            keep_features=bool(hidden),
        )
        output = HfMaskFormerModelOutput(
            class_queries_logits=predictions[-1].class_logits,
            masks_queries_logits=predictions[-1].mask_logits,
            valid_extent=valid_extent(pixel_mask),
            last_hidden_state=predictions[-1].states,
            mask_features=mask_features if hidden else None,
            hidden_states=tuple(layer.states for layer in predictions) if hidden else None,
            attentions=_attentions(predictions) if weights else None,
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


class HfMaskFormerForUniversalSegmentation(HfMaskFormerPreTrainedModel):
    """Mask classification for semantic, instance and panoptic segmentation, with its training loss."""

    def __init__(self, config: HfMaskFormerConfig) -> None:
        super().__init__(config)
        self.model = HfMaskFormerModel(config)
        self.pixel_classifier = nn.Conv2d(config.mask_dim, config.num_labels, 1) if config.loss_pixel_weight else None
        self.criterion = build_criterion(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        loss_normalizer: Tensor | None = None,
        point_seeds: Sequence[int] | Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HfMaskFormerForUniversalSegmentationOutput | tuple:
        """Predict, and with labels compute the loss.

        Args:
            pixel_values: (B, C, H, W).
            pixel_mask: (B, H, W), 0 in padding; None treats everything as image (as transformers does).
            mask_labels: B tensors (N_i, H, W), bool, uint8 or float, 0 in padding.
            class_labels: B tensors (N_i,) int64.
            loss_normalizer: (3,) from `model.loss_normalizer(...)` for a whole accumulation window; None: this batch,
                summed over processes.
            point_seeds: B integers, of this step's random points in each image (`criterion: points`); None: torch's
                global generator in training, and the same points each time in evaluation.
            output_auxiliary_logits: Return the earlier layers' logits too.

        Raises:
            ValueError: Inputs of wrong size, a class id outside the labels; names image and value.
            FloatingPointError: Non-finite logits or targets; names the image's index in the batch.
        """
        refuse_unknown_arguments(kwargs)
        check_targets(mask_labels, class_labels, pixel_values)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        supervise_all = mask_labels is not None and self.config.loss_auxiliary
        predictions, mask_features = self.model.predict(
            pixel_values,
            pixel_mask,
            all_layers=bool(supervise_all or hidden or weights or output_auxiliary_logits),
            need_weights=bool(weights),
            full_masks=bool(output_auxiliary_logits) or mask_labels is None or self.config.criterion == "dense",
            keep_features=mask_labels is not None,
        )
        loss, loss_dict, layer_losses = None, None, None
        if mask_labels is not None and class_labels is not None:
            supervised = predictions if self.config.loss_auxiliary else predictions[-1:]
            loss, loss_dict, layer_losses = self._loss(
                supervised, mask_features, pixel_mask, mask_labels, class_labels, loss_normalizer, point_seeds
            )
        output = HfMaskFormerForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            layer_losses=layer_losses,
            class_queries_logits=predictions[-1].class_logits,
            masks_queries_logits=predictions[-1].mask_logits,
            valid_extent=valid_extent(pixel_mask),
            auxiliary_logits=_auxiliary_logits(predictions) if output_auxiliary_logits else None,
            hidden_states=tuple(layer.states for layer in predictions) if hidden else None,
            attentions=_attentions(predictions) if weights else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def loss_normalizer(self, class_labels: Sequence[Tensor], divisor: float = 1.0, reduce: bool = True) -> Tensor:
        """Counts that normalise the loss of one optimiser step; hand them to every `forward` of the step.

        Args:
            class_labels: Labels (N_i,) of every image of the accumulation window on this process.
            divisor: What the loss is divided by afterwards (Accelerate: the configured accumulation steps).
            reduce: Sum over the processes of torch.distributed; then every process must make this call.
        """
        return loss_normalizer(
            class_labels,
            num_queries=self.config.num_queries,
            no_object_weight=self.config.loss_no_object_weight,
            divisor=divisor,
            reduce=reduce,
            device=self.device,
        )

    @torch.compiler.disable  # matching goes through the host: one break of the graph, here
    def _loss(
        self,
        predictions: list[LayerPrediction],
        mask_features: Tensor,
        pixel_mask: Tensor | None,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        normalizer: Tensor | None,
        point_seeds: Sequence[int] | Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        if normalizer is None:
            # A collective call outside training would hang when processes evaluate different numbers of batches.
            normalizer = self.loss_normalizer(class_labels, reduce=self.training)
        labels: dict[str, Any] = {
            "mask_labels": mask_labels,
            "class_labels": class_labels,
            "pixel_mask": pixel_mask,
            "pixel_logits": None if self.pixel_classifier is None else self.pixel_classifier(mask_features),
            "normalizer": normalizer,
        }
        if isinstance(self.criterion, LocationCriterion):
            labels.pop("pixel_logits")
            return self.criterion(predictions, **labels)
        if isinstance(self.criterion, PointCriterion):
            labels |= {"mask_features": mask_features, "mask_head": self.model.mask_head, "point_seeds": point_seeds}
            return self.criterion(predictions, **labels)
        return self.criterion(
            [layer.class_logits for layer in predictions],
            [layer.mask_logits for layer in predictions],
            anchors=predictions[-1].anchors,
            objectness=predictions[-1].objectness,
            **labels,
        )


def _auxiliary_logits(predictions: list[LayerPrediction]) -> list[dict[str, Any]]:
    return [
        {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits}
        for layer in predictions[:-1]
    ]


def _attentions(predictions: list[LayerPrediction]) -> tuple[Tensor, ...]:
    return tuple(layer.cross_attention for layer in predictions if layer.cross_attention is not None)


# transformers' image-segmentation pipeline checks this static table; Auto classes' `register` does not reach it.
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES["hf_maskformer"] = "HfMaskFormerForUniversalSegmentation"

HfMaskFormerModel.register_for_auto_class("AutoModel")
HfMaskFormerForUniversalSegmentation.register_for_auto_class("AutoModelForUniversalSegmentation")

__all__ = ["HfMaskFormerForUniversalSegmentation", "HfMaskFormerModel", "HfMaskFormerPreTrainedModel"]
