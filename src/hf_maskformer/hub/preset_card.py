"""The model card of a preset, for which no weights are published: what it builds, from its configuration.

`benchmarks/report.py` writes the cards of all presets into model_cards/. Numbers of the architecture come from the
configuration, figures from the JSON files of benchmarks/results; only `NOTES` holds sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from hf_maskformer.hub.card import MAIN_TAG, PIPELINE_TAG, write_card
from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation

CODE_LICENSE = "apache-2.0"
PIXEL_DECODERS = {
    "fpn": "feature pyramid",
    "fpn_transformer": "{layers} transformer encoder layers (width {dim}, {heads} heads, feed-forward width {ffn}) on "
    "the coarsest map, then feature pyramid",
    "deformable": "{layers} layers of deformable attention (width {dim}, {heads} heads of {points} points, "
    "feed-forward width {ffn}) over the maps at 1/8, 1/16 and 1/32, then one step of a feature pyramid",
    "deformable_memory": "{layers} layers of deformable attention (width {dim}, {heads} heads of {points} points, "
    "feed-forward width {ffn}) over maps at 1/8, 1/16, 1/32 and 1/64",
    "light": "{layers} transformer encoder layer (width {dim}, {heads} heads, feed-forward width {ffn}) on the "
    "coarsest map, then a feature pyramid of depthwise-separable convolutions",
}
QUERY_DECODERS = {
    "standard": ("transformer decoder layers", "learned queries"),
    "anchored": (
        "transformer decoder layers",
        "queries: a learned one for each class of stuff, the others from the embeddings of the pixels that look most "
        "like the middle of an object,",
    ),
    "location": (
        "location decoder layers that refine boxes, then {things} mask decoder layers for things and {stuff} for "
        "stuff",
        "learned queries (one for each class of stuff, the others for things)",
    ),
    "masked": ("layers of masked attention, self-attention and feed-forward", "learned queries"),
}
MASK_HEADS = {
    "dot_product": "whose output is multiplied with the per-pixel embedding",
    "located_dot_product": "whose output is multiplied with the per-pixel embedding, plus a linear layer whose output "
    "is multiplied with fixed codes of each pixel's place",
    "anchored_dot_product": "whose output is multiplied with the per-pixel embedding, plus a paraboloid around the "
    "query's pixel whose five numbers a linear layer gives",
}
USE = """```python
from hf_maskformer import HfMaskFormerForUniversalSegmentation, preset

labels = {{0: "road", 1: "car"}}
config = preset("{name}", id2label=labels, thing_label_ids=[1], task="panoptic")
model = HfMaskFormerForUniversalSegmentation(config)
```"""
NOT_MEASURED = "Not measured: this repository holds no training run of this preset."
MEASURED = "Of models trained from random weights by commands of this repository."


@dataclass(frozen=True)
class Note:
    """What a configuration cannot say of a preset."""

    title: str
    origin: str
    use: str


OURS = "the paper has no such model"
NOTES = {
    "maskformer-r50": Note(
        "MaskFormer with ResNet-50",
        "The semantic model of Table 1",
        "Semantic segmentation at moderate cost; with things among the labels also instance and panoptic "
        "segmentation.",
    ),
    "maskformer-r101": Note(
        "MaskFormer with ResNet-101",
        "The semantic model of Table 1",
        "As maskformer-r50, with a deeper backbone.",
    ),
    "maskformer-r50-panoptic": Note(
        "MaskFormer with ResNet-50 and a transformer encoder, for panoptic segmentation",
        "The panoptic model (section 4.2 and the released code)",
        "Panoptic segmentation of everyday scenes: countable things and uncountable stuff in one result.",
    ),
    "maskformer-swin-tiny": Note(
        "MaskFormer with Swin-T",
        "A semantic model of Table 1; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "Semantic, instance or panoptic segmentation at about the size of maskformer-r50.",
    ),
    "maskformer-swin-small": Note(
        "MaskFormer with Swin-S",
        "A semantic model of Table 1; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "Semantic, instance or panoptic segmentation where more compute than Swin-T is at hand.",
    ),
    "maskformer-swin-base": Note(
        "MaskFormer with Swin-B",
        "A semantic model of Table 1; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "The most accurate of these presets in the paper's comparison, and the slowest; meant for a GPU.",
    ),
    "maskformer-r18": Note(
        "MaskFormer with ResNet-18",
        f"Our own combination of its parts: {OURS}",
        "A smaller sibling of maskformer-r50 with decoders of the published width.",
    ),
    "maskformer-light": Note(
        "MaskFormer light",
        f"Our own reduction: {OURS}. It differs in width, depth, the map that the queries attend to, place codes in "
        "the mask head, the resolution of the loss (that of the predicted masks) and an auxiliary per-pixel loss, see "
        "docs/paper_index.md",
        "Training on a laptop, tests, teaching, and small data sets with few classes.",
    ),
    "mask2former-light": Note(
        "Mask2Former light",
        f"Our own reduction: {OURS}. It has the published parts at a quarter to a half of their width, fewer layers "
        "and a quarter of the points",
        "Training on a laptop, tests, teaching, and small data sets with few classes.",
    ),
    "mask2former-r50": Note(
        "Mask2Former with ResNet-50",
        "The model of Tables 1 to 3",
        "Panoptic, instance and semantic segmentation where quality comes before speed.",
    ),
    "mask2former-r101": Note(
        "Mask2Former with ResNet-101",
        "The model of Tables 1 to 3",
        "As mask2former-r50, with a deeper backbone.",
    ),
    "mask2former-swin-tiny": Note(
        "Mask2Former with Swin-T",
        "The model of Tables 1 to 3; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "Panoptic, instance and semantic segmentation at about the size of mask2former-r50.",
    ),
    "mask2former-swin-small": Note(
        "Mask2Former with Swin-S",
        "The model of Tables 1 to 3; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "As mask2former-swin-tiny where more compute is at hand.",
    ),
    "mask2former-swin-base": Note(
        "Mask2Former with Swin-B",
        "The model of Tables 1 to 3; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "The most accurate of these presets in the paper's comparison, and the slowest; meant for a GPU.",
    ),
    "panoptic-segformer-light": Note(
        "Panoptic SegFormer light",
        f"Our own reduction: {OURS}. It has the published parts at a quarter to a half of their width and fewer "
        "layers",
        "Training on a laptop, tests and teaching.",
    ),
    "panoptic-segformer-r50": Note(
        "Panoptic SegFormer with ResNet-50",
        "The model of Table 1",
        "Panoptic and instance segmentation with many things of very different sizes.",
    ),
    "panoptic-segformer-pvtv2-b0": Note(
        "Panoptic SegFormer with PVTv2-B0",
        "The smallest model of Table 1; backbone: Wang et al., PVT v2, 2022",
        "As panoptic-segformer-r50 with half of its parameters.",
    ),
    "panoptic-segformer-pvtv2-b2": Note(
        "Panoptic SegFormer with PVTv2-B2",
        "A model of Table 1; backbone: Wang et al., PVT v2, 2022",
        "As panoptic-segformer-r50, more accurate in the paper's comparison at about its size.",
    ),
    "lite-mobilenetv3-small": Note(
        "Lite MaskFormer with MobileNetV3-small",
        f"Our own combination: {OURS}; backbone: Howard et al., Searching for MobileNetV3, ICCV 2019",
        "Real time on a CPU and small devices, and files of a few megabytes; the smallest and fastest preset.",
    ),
    "lite-mobilenetv3-large": Note(
        "Lite MaskFormer with MobileNetV3-large",
        f"Our own combination: {OURS}; backbone: Howard et al., Searching for MobileNetV3, ICCV 2019",
        "As lite-mobilenetv3-small where twice its time is at hand.",
    ),
    "lite-mobilenetv4-small": Note(
        "Lite MaskFormer with MobileNetV4-small",
        f"Our own combination: {OURS}; backbone: Qin et al., MobileNetV4, ECCV 2024 (the convolutional small model)",
        "Real time on a CPU where lite-mobilenetv3-small is not accurate enough; its backbone is plain convolutions "
        "with ReLU, without squeeze-and-excitation.",
    ),
    "lite-swin-tiny": Note(
        "Lite MaskFormer with Swin-T",
        f"Our own combination: {OURS}; backbone: Liu et al., Swin Transformer, ICCV 2021",
        "Quality of a transformer backbone with decoders that cost little beside it; real time on a GPU.",
    ),
    "maskformer-light-anchored": Note(
        "MaskFormer light with anchored queries",
        f"Our own: {OURS}. maskformer-light with queries in the manner of FastInst, matched by their place, see "
        "docs/paper_index.md",
        "Countable objects (instance and panoptic segmentation) from random weights: cells, parts, particles, for "
        "which no pretrained backbone exists. For semantic segmentation take maskformer-light.",
    ),
}


def preset_card(
    name: str, config: HfMaskFormerConfig, *, summary: str, paper: str, figures: Sequence[str] = ()
) -> ModelCard:
    """The card of the preset `name`.

    Args:
        name: as `preset` takes it.
        config: what the preset builds; the stated number of parameters is counted with its labels.
        summary: the preset's one line, which stands in for a note where `NOTES` has none.
        paper: where it comes from.
        figures: lines of Markdown with what was measured; without any the card says that nothing was.
    """
    note = NOTES.get(name, Note(name, "See docs/paper_index.md", f"{summary[:1].upper()}{summary[1:]}."))
    head = f'No weights are published yet: this card describes the architecture that `preset("{name}")` builds.'
    sections = {
        "Architecture": architecture_section(config),
        "Source": f"{paper}. {note.origin}.",
        "Intended use": f"{note.use}\n\n{USE.format(name=name)}",
        "Training data and results": "\n".join([MEASURED, "", *figures]) if figures else NOT_MEASURED,
        "Limits": limits_section(config),
        "Licence": "The code is part of hf_maskformer, Apache-2.0.",
    }
    metadata = ModelCardData(
        library_name="transformers", license=CODE_LICENSE, pipeline_tag=PIPELINE_TAG, tags=[MAIN_TAG, PIPELINE_TAG]
    )
    return write_card(metadata, note.title, head, sections)


def architecture_section(config: HfMaskFormerConfig) -> str:
    """The parts with every size; the parameters are counted on a model without storage."""
    with torch.device("meta"):
        count = HfMaskFormerForUniversalSegmentation(config).num_parameters()
    lines = {
        "Backbone": backbone_words(config),
        "Pixel decoder": f"{pixel_decoder_words(config)}, width {config.pixel_decoder_dim}, "
        f"{embedding_words(config)}.",
        "Query decoder": query_decoder_words(config),
        "Heads": head_words(config),
        "Parameters": f"{count:,} with {config.num_labels} labels",
    }
    return "\n".join(f"- **{title}:** {text}" for title, text in lines.items())


def embedding_words(config: HfMaskFormerConfig) -> str:
    if config.mask_head == "none":
        return "without a per-pixel embedding"
    return f"with a {config.mask_dim}-channel per-pixel embedding at 1/4 of the image"


def head_words(config: HfMaskFormerConfig) -> str:
    if config.mask_head == "none":
        return "sigmoid class scores and boxes of each location layer; masks are weighed sums of the attention maps."
    return (
        f'one linear layer to the labels and "no object"; a {config.mask_head_layers}-layer MLP '
        f"{MASK_HEADS[config.mask_head]}."
    )


def backbone_words(config: HfMaskFormerConfig) -> str:
    backbone: Any = config.backbone_config
    if backbone.model_type == "resnet":
        text = (
            f"ResNet, stages of {_row(backbone.depths)} {backbone.layer_type} blocks with "
            f"{_row(backbone.hidden_sizes)} channels."
        )
        if config.backbone_freeze_batch_norm:
            return (
                f"{text} Its batch norms are frozen, as published for ImageNet-trained weights; to train from random "
                "weights pass `backbone_freeze_batch_norm=False`."
            )
        return f"{text} Its batch norms are trained."
    if backbone.model_type == "swin":
        return (
            f"Swin Transformer, stages of {_row(backbone.depths)} blocks with {_row(backbone.num_heads)} heads, "
            f"first width {backbone.embed_dim}, windows of {backbone.window_size} x {backbone.window_size}; "
            f"stochastic depth of {backbone.drop_path_rate} in training."
        )
    if backbone.model_type == "pvt_v2":
        return (
            f"Pyramid Vision Transformer v2, stages of {_row(backbone.depths)} blocks with "
            f"{_row(backbone.num_attention_heads)} heads and {_row(backbone.hidden_sizes)} channels; stochastic depth "
            f"of {backbone.drop_path_rate} in training."
        )
    if backbone.model_type == "timm_backbone":
        return f"timm's `{backbone.backbone}`. Its batch norms are trained."
    return f"transformers' `{backbone.model_type}`."


def pixel_decoder_words(config: HfMaskFormerConfig) -> str:
    text = PIXEL_DECODERS[config.pixel_decoder]
    return text.format(
        layers=config.pixel_decoder_layers,
        dim=config.pixel_decoder_dim,
        heads=config.pixel_decoder_heads,
        ffn=config.pixel_decoder_ffn_dim,
        points=config.pixel_decoder_points,
    )


def query_decoder_words(config: HfMaskFormerConfig) -> str:
    dropout = config.query_decoder_dropout
    layers, queries = QUERY_DECODERS[config.query_decoder]
    layers = layers.format(things=config.query_decoder_thing_mask_layers, stuff=config.query_decoder_stuff_mask_layers)
    return (
        f"{config.query_decoder_layers} {layers}, width {config.query_decoder_dim}, "
        f"{config.query_decoder_heads} heads, feed-forward width {config.query_decoder_ffn_dim}, "
        f"{config.num_queries} {queries} that attend to {memory_words(config)}, "
        f"{f'dropout {dropout}' if dropout else 'no dropout'}."
    )


def memory_words(config: HfMaskFormerConfig) -> str:
    if config.query_decoder == "masked":
        *others, last = (f"1/{stride}" for stride in config.query_decoder_memory_strides)
        maps = (
            f"maps at {', '.join(others)} and {last} of the image in turn" if others else f"map at {last} of the image"
        )
        return f"the {maps}, each within its own mask"
    if config.query_decoder == "location":
        return "all maps (boxes) and to those at 1/8 to 1/32 (masks)"
    return f"the map at 1/{config.query_decoder_memory_stride} of the image"


def limits_section(config: HfMaskFormerConfig) -> str:
    height, width = config.image_size
    coarse = config.criterion_resolution == "prediction"
    finer = ["Its loss compares masks at that resolution too, so finer outlines are not learned."] if coarse else []
    lines = [
        f"Images are fitted into a canvas of {height} x {width} pixels (height x width) and padded; smaller or larger "
        "detail needs another `image_size`.",
        f"At most {config.num_queries} segments can be found in an image (`num_queries`); more targets than that are "
        "left out of the loss, with a warning.",
        "Masks are predicted at a quarter of the image's resolution; objects of a few pixels and thin structures are "
        "easily lost.",
        *finer,
        "Random weights: without training it predicts nothing of use, and its errors on people, places or conditions "
        "that a training set lacks are unknown. Measure on your own data before you rely on it.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _row(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
