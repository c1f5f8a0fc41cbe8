"""Fields of the configuration that depend on each other."""

from typing import Any


def check_consistency(config: Any) -> None:
    """All checks that span several fields of an `HfMaskFormerConfig`; ValueError names fields, values, what fits."""
    allowed = sorted(config.id2label)
    if not allowed or allowed != list(range(len(allowed))):
        raise ValueError(f"id2label must have the ids 0..K-1 without a gap, got {allowed}.")
    if config.ignore_index in config.id2label:
        raise ValueError(
            f"ignore_index {config.ignore_index} is also the label {config.id2label[config.ignore_index]!r}: its "
            f"pixels would never be trained. Choose an ignore_index outside 0..{len(allowed) - 1}, or None."
        )
    for label_id in config.thing_label_ids or ():
        if label_id not in config.id2label:
            raise ValueError(f"thing_label_ids contains {label_id}, allowed are the ids of id2label: {allowed}.")
    if len(config.image_size) != config.spatial_dims or min(config.image_size) < 1:
        raise ValueError(f"image_size must be {config.spatial_dims} positive integers, got {config.image_size}.")
    if config.spatial_dims != 2:
        raise ValueError(
            f"spatial_dims is {config.spatial_dims}; pixel_decoder {config.pixel_decoder!r} allows 2 only."
        )
    for width, heads in (
        ("query_decoder_dim", "query_decoder_heads"),
        ("pixel_decoder_dim", "pixel_decoder_heads"),
    ):
        if getattr(config, width) % getattr(config, heads):
            raise ValueError(
                f"{width} ({getattr(config, width)}) must be a multiple of {heads} ({getattr(config, heads)})."
            )
    if config.query_decoder_dim % 4 or config.pixel_decoder_dim % 4:
        raise ValueError(
            f"query_decoder_dim ({config.query_decoder_dim}) and pixel_decoder_dim ({config.pixel_decoder_dim}) must "
            "be multiples of 4 (sine and cosine of two coordinates)."
        )
    if config.class_activation == "sigmoid" and config.class_head == "linear" and config.query_decoder != "location":
        raise ValueError("class_activation 'sigmoid' needs a class head of its own; class_head 'linear' is softmax.")
    if config.matcher == "fixed" and (config.task != "semantic" or config.num_queries < len(config.id2label)):
        raise ValueError(
            f"matcher 'fixed' gives query k the class k: task must be 'semantic' (is {config.task!r}) and "
            f"num_queries ({config.num_queries}) at least the number of labels ({len(config.id2label)})."
        )
    if config.num_queries < 1:
        raise ValueError(f"num_queries must be at least 1, got {config.num_queries}.")
    for name in ("threshold", "mask_threshold", "overlap_mask_area_threshold", "stuff_overlap_mask_area_threshold"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}.")
    _check_points(config)
    _check_location(config)
    _check_anchors(config)


def _check_points(config: Any) -> None:
    """What Mask2Former's decoder and criterion need of the others."""
    if config.criterion == "points":
        if config.mask_head not in ("dot_product", "located_dot_product"):
            raise ValueError(
                "criterion 'points' needs mask_head 'dot_product' or 'located_dot_product', whose masks are products "
                f"of a query and a pixel; it is {config.mask_head!r}."
            )
        if config.matcher == "located":
            raise ValueError("criterion 'points' needs matcher 'hungarian' or 'fixed', it is 'located'.")
        if not (config.criterion_points >= 1 and config.criterion_oversample_ratio >= 1):
            raise ValueError(
                "criterion_points and criterion_oversample_ratio must be at least 1, got "
                f"{config.criterion_points} and {config.criterion_oversample_ratio}."
            )
        if not 0 <= config.criterion_importance_ratio <= 1:
            raise ValueError(f"criterion_importance_ratio must be in 0..1, got {config.criterion_importance_ratio}.")
    strides = config.query_decoder_memory_strides
    if not strides or not set(strides) <= {8, 16, 32}:
        raise ValueError(f"query_decoder_memory_strides must be one or more of 8, 16 and 32, got {strides}.")
    if config.query_decoder == "masked" and config.mask_head == "anchored_dot_product":
        raise ValueError("mask_head 'anchored_dot_product' needs query_decoder 'anchored', which is 'masked'.")


LOCATION_PARTS = {
    "pixel_decoder": "deformable_memory",
    "criterion": "location",
    "mask_head": "none",
    "class_head": "none",
    "class_activation": "sigmoid",
}


def _check_location(config: Any) -> None:
    """Panoptic SegFormer's parts need each other, and its stuff queries a place among the queries."""
    if config.query_decoder != "location":
        for name in ("pixel_decoder", "criterion", "mask_head", "class_head"):
            if getattr(config, name) == LOCATION_PARTS[name]:
                raise ValueError(
                    f"{name} {LOCATION_PARTS[name]!r} needs query_decoder 'location', which is "
                    f"{config.query_decoder!r}."
                )
        return
    for name, value in LOCATION_PARTS.items():
        if getattr(config, name) != value:
            raise ValueError(f"query_decoder 'location' needs {name} {value!r}, it is {getattr(config, name)!r}.")
    if config.matcher != "hungarian" or config.loss_pixel_weight:
        raise ValueError(
            f"query_decoder 'location' has matcher 'hungarian' (is {config.matcher!r}) and no per-pixel embedding for "
            f"loss_pixel_weight (is {config.loss_pixel_weight})."
        )
    stuff = len(config.id2label) - len(config.thing_label_ids or ())
    if config.thing_label_ids and config.num_queries <= stuff:
        raise ValueError(
            f"query_decoder 'location' gives one query to each of the {stuff} classes of stuff and the others to "
            f"things; num_queries is {config.num_queries} and must be greater."
        )
    if not config.thing_label_ids and config.num_queries != stuff:
        raise ValueError(
            f"Without things query_decoder 'location' has one query for each of the {stuff} classes: set num_queries "
            f"to {stuff}, it is {config.num_queries}."
        )


def _check_anchors(config: Any) -> None:
    """Parts that need anchored queries, and the number of queries that are left for anchors."""
    if config.query_decoder == "anchored":
        stuff = len(config.id2label) - len(config.thing_label_ids or ())
        if config.num_queries <= stuff:
            raise ValueError(
                f"query_decoder 'anchored' gives one query to each of the {stuff} classes of stuff and the others "
                f"to things; num_queries is {config.num_queries} and must be greater."
            )
        if not config.thing_label_ids:
            raise ValueError(
                "query_decoder 'anchored' anchors the queries of things, but thing_label_ids is empty; use "
                "'standard' (with matcher 'fixed' for semantic models)."
            )
        if config.matcher == "fixed":
            raise ValueError(
                "matcher 'fixed' gives query k the class k, but query_decoder 'anchored' orders its queries "
                "otherwise; use 'located' or 'hungarian'."
            )
        return
    if config.loss_one_to_many_weight:
        raise ValueError(
            f"loss_one_to_many_weight is {config.loss_one_to_many_weight}; it needs query_decoder 'anchored', which "
            f"is {config.query_decoder!r}."
        )
    for name, value in (("matcher", "located"), ("mask_head", "anchored_dot_product")):
        if getattr(config, name) == value:
            raise ValueError(f"{name} {value!r} needs query_decoder 'anchored', which is {config.query_decoder!r}.")
