"""Fine-tuning: the weights of any checkpoint under new classes and another number of queries; parts that stay frozen.

A parameter either has one row for each class or query (`ROWS`), or is taken over whole. Rows follow the names of the
classes, not their numbers: what a checkpoint knows of "road" becomes "road" of the new data set, wherever it stands
there. Nothing is left at random without a message.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation

# Parameters whose first dimension counts classes (K), classes and "no object" (K + 1), queries (Q), queries of things,
# classes of things or classes of stuff.
ROWS = (
    (re.compile(r"model\.class_head\.projection\.(weight|bias)"), "classes and no object"),
    (re.compile(r"pixel_classifier\.(weight|bias)"), "classes"),
    (re.compile(r"model\.query_decoder\.query_(positions|features)\.weight"), "queries"),
    (re.compile(r"model\.query_decoder\.thing_queries\.weight"), "thing queries"),
    (re.compile(r"model\.query_decoder\.class_predictors\.\d+\.(weight|bias)"), "things"),
    (re.compile(r"model\.query_decoder\.stuff_queries\.weight"), "stuff"),
)
PLACEHOLDER = re.compile(r"label_\d+", re.IGNORECASE)  # what is written where nobody gave names
SHOWN_NAMES = 8

logger = logging.getLogger(__name__)


class Transfer(NamedTuple):
    """Which rows and parameters of the new model come from where."""

    class_rows: list[int | None]  # for each new class the stored class of its name
    query_rows: list[int | None]  # for each new query (of "location": of things) a stored one
    new_parameters: list[str]  # that the checkpoint lacks
    unused_parameters: list[str]  # of the checkpoint, that the new model lacks


def fine_tuned_model(source: str, fields: Mapping[str, Any]) -> HfMaskFormerForUniversalSegmentation:
    """A model with the architecture and the weights of a checkpoint, ours or official, changed by `fields`.

    Args:
        source: directory or Hub id.
        fields: configuration fields that replace the checkpoint's: labels, task, `num_queries`, ...

    Classes that both label sets name alike (capitals, spaces, hyphens and underscores do not count) keep their rows in
    class heads and per-pixel classifier, and so does "no object". Of more queries the stored ones come first, of fewer
    the first are kept; a query that belongs to a class goes with it: with `matcher="fixed"` before and after, and
    stuff of "anchored" and "location". The latter has no weights in common for things and stuff, so a class that
    changes between them starts anew. Other rows, and parameters that the checkpoint lacks, are as the model
    initialises them; a warning says which.

    Raises:
        ValueError: `source` cannot be loaded, or one of `fields` changes the shape of another parameter; names the
            parameter, both shapes and the field.
    """
    stored, missing = loaded(source)
    config = HfMaskFormerConfig.from_pretrained(source, **fields)
    model = HfMaskFormerForUniversalSegmentation(config)
    weights = {name: value for name, value in stored.state_dict().items() if name not in missing}
    try:
        transfer = transfer_weights(weights, stored.config, model)
    except ShapeMismatch as error:
        changed = {name: value for name, value in fields.items() if differs(stored.config, config, name)}
        raise ValueError(
            f"init_from {source}: {error}, because of {' or '.join(responsible(error, source, changed))}. Only "
            "classes and num_queries can be changed; leave the rest as it is in the checkpoint"
        ) from error
    report(source, stored.config, config, transfer)
    return model


def loaded(source: str) -> tuple[HfMaskFormerForUniversalSegmentation, set[str]]:
    """The stored model, and the names of parameters for which the checkpoint has no weights."""
    try:
        model, information = HfMaskFormerForUniversalSegmentation.from_pretrained(source, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"init_from {source} is no directory or Hub id that can be loaded: {error}") from error
    return model, set(information["missing_keys"])


class ShapeMismatch(ValueError):
    """A parameter of the checkpoint that does not fit into the new model."""

    def __init__(self, name: str, stored: Tensor, wanted: Tensor) -> None:
        self.name, self.shape = name, tuple(wanted.shape)
        super().__init__(
            f"{name} is {tuple(stored.shape)} in the checkpoint and {self.shape} in the model that is asked for"
        )


@torch.no_grad()
def transfer_weights(
    weights: dict[str, Tensor], stored_config: Any, model: HfMaskFormerForUniversalSegmentation
) -> Transfer:
    """Copy `weights`, parameters and buffers of a model of `stored_config`, into `model`, row by row where they go by
    class or query.

    Raises:
        ShapeMismatch: a parameter does not fit.
    """
    config = model.config
    classes = class_rows(names_of(stored_config), names_of(config))
    if config.query_decoder == "location":
        classes = same_kind(stored_config, config, classes)
    queries = query_rows(stored_config, config, classes)
    rows: dict[str, list[int | None]] = {
        "classes": classes,
        "classes and no object": [*classes, stored_config.num_labels],
        "queries": queries,
        "thing queries": queries,
        "things": places_among(thing_labels(stored_config), thing_labels(config), classes),
        "stuff": places_among(stuff_labels(stored_config), stuff_labels(config), classes),
    }
    targets = model.state_dict()
    for name, target in targets.items():
        if name not in weights:
            continue
        kind = rows_of(name)
        if kind is not None:
            copy_rows(name, weights[name], target, rows[kind])
        elif weights[name].shape == target.shape:
            target.copy_(weights[name])
        else:
            raise ShapeMismatch(name, weights[name], target)
    new = [name for name in targets if name not in weights]
    return Transfer(classes, queries, new, [name for name in weights if name not in targets])


def copy_rows(name: str, stored: Tensor, target: Tensor, rows: Sequence[int | None]) -> None:
    """Row k of `target` becomes row `rows[k]` of `stored`, where that is not None."""
    highest = max((row for row in rows if row is not None), default=0)
    if len(rows) != len(target) or highest >= len(stored) or stored.shape[1:] != target.shape[1:]:
        raise ShapeMismatch(name, stored, target)
    for number, row in enumerate(rows):
        if row is not None:
            target[number] = stored[row].to(target.dtype)


def rows_of(name: str) -> str | None:
    """What the rows of a parameter stand for, see `ROWS`; None: nothing that fine-tuning changes."""
    return next((kind for pattern, kind in ROWS if pattern.fullmatch(name)), None)


def class_rows(stored: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each wanted class the number of the stored class of the same name, or None.

    Equal lists keep their order, also where nobody gave names (LABEL_0, ...); otherwise such names mean nothing.
    """
    if list(stored) == list(wanted):
        return list(range(len(stored)))
    places: dict[str, int] = {}
    for number, name in enumerate(stored):
        if not PLACEHOLDER.fullmatch(name):
            places.setdefault(spelling(name), number)
    return [None if PLACEHOLDER.fullmatch(name) else places.get(spelling(name)) for name in wanted]


def spelling(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"[\W_]+", "", name).casefold() or name


def names_of(config: Any) -> list[str]:
    return [str(config.id2label[label]) for label in sorted(config.id2label)]


def query_rows(stored: Any, wanted: Any, classes: Sequence[int | None]) -> list[int | None]:
    """For each query the stored query it begins as, or None for a new one; of "location" for the queries of things."""
    known, count = own_queries(stored), own_queries(wanted)
    rows: list[int | None] = [number if number < known else None for number in range(count)]
    if stored.matcher == wanted.matcher == "fixed":  # query k is the query of class k
        further = range(stored.num_labels, stored.num_queries)
        rows = [*classes, *further, *[None] * wanted.num_queries][: wanted.num_queries]
    return rows


def own_queries(config: Any) -> int:
    """Queries that belong to no class; all of them but for "location", whose stuff has queries of its own."""
    if config.query_decoder != "location":
        return config.num_queries
    return config.num_queries - len(stuff_labels(config)) if config.thing_label_ids else 0


def same_kind(stored: Any, wanted: Any, classes: Sequence[int | None]) -> list[int | None]:
    """`classes` without those that were things and are stuff now, or the other way round."""
    things, others = set(thing_labels(wanted)), set(thing_labels(stored))
    return [row if (label in things) == (row in others) else None for label, row in enumerate(classes)]


def places_among(stored: Sequence[int], wanted: Sequence[int], classes: Sequence[int | None]) -> list[int | None]:
    """For each of the wanted labels the place of its stored class among the stored labels, or None."""
    places = {label: place for place, label in enumerate(stored)}
    taken = [classes[label] for label in wanted]
    return [None if label is None else places.get(label) for label in taken]


def thing_labels(config: Any) -> list[int]:
    return sorted(config.thing_label_ids or ())


def stuff_labels(config: Any) -> list[int]:
    return [label for label in range(config.num_labels) if label not in (config.thing_label_ids or ())]


def differs(stored: Any, wanted: Any, field: str) -> bool:
    return stored.to_dict().get(field) != wanted.to_dict().get(field)


def responsible(mismatch: ShapeMismatch, source: str, changed: Mapping[str, Any]) -> list[str]:
    """Those of the changed fields that alone give the parameter its new shape; all of them if none does."""
    found = []
    for name, value in changed.items():
        try:
            config = HfMaskFormerConfig.from_pretrained(source, **{name: value})
            with torch.device("meta"):
                shapes = HfMaskFormerForUniversalSegmentation(config).state_dict()
        except ValueError:  # the field is possible together with others only
            continue
        if mismatch.name in shapes and tuple(shapes[mismatch.name].shape) == mismatch.shape:
            found.append(name)
    return [f"{name}={changed[name]!r}" for name in found or changed]


def report(source: str, stored: Any, wanted: Any, transfer: Transfer) -> None:
    """Say what was kept and what starts anew."""
    old_names, new_names = names_of(stored), names_of(wanted)
    if old_names != new_names or None in transfer.class_rows:
        kept = [name for name, row in zip(new_names, transfer.class_rows, strict=True) if row is not None]
        fresh = [name for name, row in zip(new_names, transfer.class_rows, strict=True) if row is None]
        logger.warning(
            "init_from %s: the heads are made for %d classes instead of %d; kept by their name: %s; starting anew: %s",
            *(source, len(new_names), len(old_names), listed(kept), listed(fresh)),
        )
    if stored.task != wanted.task:
        logger.warning("init_from %s: the task is %s, it was %s", source, wanted.task, stored.task)
    if wanted.query_decoder == "anchored":  # no weights of their own
        if stored.num_queries != wanted.num_queries:
            logger.warning("init_from %s: %d queries instead of %d", source, wanted.num_queries, stored.num_queries)
    elif transfer.query_rows != list(range(own_queries(stored))):
        kept_queries = sum(row is not None for row in transfer.query_rows)
        of_things = " of things" if wanted.query_decoder == "location" else ""
        logger.warning(
            "init_from %s: %d queries%s instead of %d; %d keep their weights, %d start anew",
            *(source, len(transfer.query_rows), of_things, own_queries(stored), kept_queries),
            len(transfer.query_rows) - kept_queries,
        )
    for what, names in (("start anew", transfer.new_parameters), ("are not used", transfer.unused_parameters)):
        if names:
            holder = "the checkpoint does not have them" if what == "start anew" else "of the checkpoint"
            logger.warning("init_from %s: %d parameters %s (%s): %s", source, len(names), what, holder, listed(names))


def listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Frozen parts
# ---------------------------------------------------------------------------------------------------------------------


class HeldBatchNorm(nn.Module):
    """Mixed into the class of a batch norm so that it stays in eval mode: its statistics are used and not changed."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def parts_of(model: HfMaskFormerForUniversalSegmentation) -> dict[str, nn.Module]:
    """The parts that can be named in options: backbone, decoders and heads, and the per-pixel classifier if any."""
    own = {name: part for name, part in model.named_children() if name not in ("model", "criterion")}
    return {**dict(model.model.named_children()), **own}


def freeze_parts(model: HfMaskFormerForUniversalSegmentation, names: Iterable[str]) -> None:
    """Take the parts out of training: no gradients, and batch norms that keep statistics and affine values.

    Dropout and stochastic depth of a frozen part stay on, as in any training.

    Raises:
        ValueError: the model has no such part, or no other is left.
    """
    parts = parts_of(model)
    for name in names:
        check_part("freeze", name, parts)
        parts[name].requires_grad_(False)
        hold_batch_norms(parts[name])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze {', '.join(names)} leaves no part to train")


def check_part(option: str, name: str, parts: Iterable[str]) -> None:
    if name not in parts:
        raise ValueError(f"{option} names {name!r}; the parts of this model are {', '.join(parts)}")


def held_batch_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms for which `hold_batch_norms` was called."""
    return [name for name, module in model.named_modules() if isinstance(module, HeldBatchNorm)]


def hold_batch_norms(part: nn.Module) -> None:
    """Keep the batch norms of a part in eval mode from now on, whatever mode the model is set to."""
    for module in part.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, HeldBatchNorm):
            kind = type(module)
            # The same parameters, buffers and names; only the class learns to stay in eval mode.
            module.__class__ = type(f"Held{kind.__name__}", (HeldBatchNorm, kind), {})
            module.eval()
