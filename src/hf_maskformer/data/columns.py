"""Which columns of a `datasets` data set hold the image and its truth: as the user says, or by names and types."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Image, LargeList, List, Value

logger = logging.getLogger(__name__)

# Role -> the column names that are taken for it when the user says nothing. Case and a file suffix do not count.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "pixel_values", "jpg", "jpeg"),
    "semantic_map": ("label", "annotation", "mask", "segmentation", "semantic_map", "semantic", "seg", "label_map"),
    "panoptic_map": ("panoptic", "panoptic_map", "panoptic_seg", "panoptic_segmentation", "panoptic_mask"),
    "segments_info": ("segments_info", "segments"),
    "instance_map": ("instance_map", "instance", "instances", "instance_mask"),
    "objects": ("objects", "annotations", "annotation", "instances", "anns"),
    "masks": ("masks", "instance_masks", "object_masks"),
    "labels": ("labels", "label", "class_labels", "categories", "category", "classes"),
    "image_id": ("image_id",),
    "file_name": ("file_name", "filename"),
}
# Kind of truth -> (the roles it needs, the roles it may use). Where two kinds fit, a later one of RICHER wins.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "semantic": (("semantic_map",), ()),
    "panoptic": (("panoptic_map", "segments_info"), ()),
    "instance_map": (("instance_map",), ("semantic_map",)),
    "objects": (("objects",), ()),
    "masks": (("masks", "labels"), ()),
}
RICHER_THAN_SEMANTIC = ("panoptic", "instance_map")
TRUTH_ROLES = {role for needed, extra in KINDS.values() for role in needed + extra}
ROLES = tuple(COLUMN_NAMES)

CATEGORY_FIELDS = ("category_id", "category", "label_id", "label", "class_id", "class")
SEGMENTATION_FIELDS = ("segmentation", "segmentations", "polygons", "rle")


@dataclass(frozen=True)
class Columns:
    """Attributes:
    kind: a key of `KINDS`.
    roles: role -> column name, "image" always among them.
    """

    kind: str
    roles: dict[str, str]

    @property
    def truth_roles(self) -> set[str]:
        return set(self.roles) & TRUTH_ROLES


def resolve_columns(features: Mapping[str, Any], given: Mapping[str, str] | None, where: str) -> Columns:
    """The columns to read.

    Args:
        features: of the data set.
        given: role -> column name, or None; roles that are left out are guessed, and the guess is logged.
        where: the data set's name for messages.

    Raises:
        ValueError: an unknown role or column, a column of a type that cannot hold its role, or a guess that is
            ambiguous or incomplete; the message lists the columns with their types and shows what to write.
    """
    given = _checked(features, given or {}, where)
    kind_names = _possible_kinds(features, given, where)
    candidates = {role: [given[role]] for role in given}
    taken = set(given.values())
    for role in ROLES:
        if role not in given:
            candidates[role] = [
                name for name in features if name not in taken and _fits_by_name(role, name, features[name])
            ]
    _share_ambiguous_maps(candidates)
    kind = _choose_kind(features, kind_names, candidates, given, where)
    needed, extra = KINDS[kind]
    roles = {role: _only(features, role, candidates[role], where) for role in needed}
    roles |= {role: _only(features, role, candidates[role], where) for role in extra if candidates[role]}
    roles |= {role: candidates[role][0] for role in ("image_id", "file_name") if len(candidates[role]) == 1}
    roles["image"] = _image_column(features, candidates["image"], roles, where)
    guessed = {role: name for role, name in roles.items() if role not in given}
    if guessed:
        logger.info("%s: columns are guessed: %s", where, ", ".join(f"{r} = {n!r}" for r, n in guessed.items()))
    return Columns(kind, roles)


def class_names(features: Mapping[str, Any], columns: Columns) -> dict[int, str] | None:
    """Names of the class numbers where a ClassLabel feature of the truth says them."""
    for role in ("objects", "segments_info", "labels"):
        if role not in columns.roles:
            continue
        feature = _inner(features[columns.roles[role]])
        if isinstance(feature, dict):
            fields = record_fields(feature)
            feature = next((_inner(fields[name]) for name in CATEGORY_FIELDS if name in fields), None)
        if isinstance(feature, ClassLabel) and feature.names:
            return dict(enumerate(feature.names))
    return None


def describe(feature: Any) -> str:
    """A feature's type in a few words."""
    if isinstance(feature, (List, LargeList)):
        return f"list of {describe(feature.feature)}"
    if isinstance(feature, dict):
        return "struct of " + ", ".join(f"{name}: {describe(inner)}" for name, inner in feature.items())
    if isinstance(feature, ClassLabel):
        return f"ClassLabel with {feature.num_classes} names"
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def is_image(feature: Any) -> bool:
    """Image, or what a file without the `datasets` metadata makes of it: bytes, or a struct of bytes and path."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def record_fields(feature: Any) -> Mapping[str, Any]:
    """The fields of a struct, or of a list of structs."""
    fields = _inner(feature)
    return fields if isinstance(fields, dict) else {}


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, (List, LargeList)) else feature


def _has_fields(*groups: tuple[str, ...]) -> Callable[[Any], bool]:
    """Whether a struct, or a list of structs, has a field of each group."""

    def fits(feature: Any) -> bool:
        fields = record_fields(feature)
        return all(any(name in fields for name in group) for group in groups)

    return fits


def _is_text_or_integer(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and ("int" in feature.dtype or "string" in feature.dtype)
    )


# Role -> (test of the feature, what it must be in words).
ROLE_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image": (is_image, "an Image"),
    "semantic_map": (is_image, "an Image of label ids"),
    "panoptic_map": (is_image, "an Image of segment ids"),
    "segments_info": (_has_fields(("id",), CATEGORY_FIELDS), "a list of structs with id and category_id"),
    "instance_map": (is_image, "an Image of instance ids"),
    "objects": (
        _has_fields(CATEGORY_FIELDS, SEGMENTATION_FIELDS),
        "a list of structs (or a struct of lists) with category and segmentation",
    ),
    "masks": (lambda f: isinstance(f, (List, LargeList)) and is_image(f.feature), "a list of Images"),
    "labels": (
        lambda f: isinstance(f, (List, LargeList)) and _is_text_or_integer(f.feature),
        "a list of class numbers or names",
    ),
    "image_id": (_is_text_or_integer, "a number or text"),
    "file_name": (lambda f: isinstance(f, Value) and "string" in f.dtype, "text"),
}


def _fits_by_name(role: str, name: str, feature: Any) -> bool:
    plain = name.lower().removesuffix(".png")
    return plain in COLUMN_NAMES[role] and ROLE_TYPES[role][0](feature)


def _checked(features: Mapping[str, Any], given: Mapping[str, str], where: str) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise ValueError(_message(features, where, f"columns is {given!r}, it must map roles to column names"))
    for role, name in given.items():
        if role not in ROLES:
            raise ValueError(_message(features, where, f"{role!r} is no role"))
        if not isinstance(name, str):
            raise ValueError(_message(features, where, f"the column given as {role} is {name!r}, it must be a name"))
        if name not in features:
            raise ValueError(_message(features, where, f"there is no column {name!r} (given as {role})"))
        fits, wanted = ROLE_TYPES[role]
        if not fits(features[name]):
            problem = f"column {name!r} cannot be {role}: it must be {wanted}, but is {describe(features[name])}"
            raise ValueError(_message(features, where, problem))
    return dict(given)


def _possible_kinds(features: Mapping[str, Any], given: Mapping[str, str], where: str) -> list[str]:
    truths = set(given) & TRUTH_ROLES
    kinds = [kind for kind, (needed, extra) in KINDS.items() if truths <= {*needed, *extra}]
    if not kinds:
        raise ValueError(_message(features, where, f"the roles {', '.join(sorted(truths))} do not go together"))
    if truths == {"semantic_map"}:
        return ["semantic"]  # an instance map that happens to be there is not asked for
    return kinds


def _share_ambiguous_maps(candidates: dict[str, list[str]]) -> None:
    """Beside segments_info, a map with the name of a semantic map is the panoptic map."""
    if candidates["segments_info"] and not candidates["panoptic_map"] and len(candidates["semantic_map"]) == 1:
        candidates["panoptic_map"] = candidates["semantic_map"]


def _choose_kind(
    features: Mapping[str, Any],
    kinds: list[str],
    candidates: Mapping[str, list[str]],
    given: Mapping[str, str],
    where: str,
) -> str:
    complete = [kind for kind in kinds if all(candidates[role] for role in KINDS[kind][0])]
    if "semantic" in complete and any(kind in complete for kind in RICHER_THAN_SEMANTIC):
        complete.remove("semantic")
    if len(complete) == 1:
        return complete[0]
    if complete:
        found = "; ".join(
            " + ".join(f"{role} = {' or '.join(map(repr, candidates[role]))}" for role in KINDS[kind][0])
            for kind in complete
        )
        raise ValueError(_message(features, where, f"several columns could be the truth ({found})"))
    if given.keys() & TRUTH_ROLES:
        lacking = {kind: [role for role in KINDS[kind][0] if not candidates[role]] for kind in kinds}
        needs = "; ".join(f"{kind} also needs {', '.join(roles)}" for kind, roles in lacking.items())
        raise ValueError(_message(features, where, f"the columns given do not suffice: {needs}"))
    raise ValueError(_message(features, where, "no column is known by its name and type to hold masks"))


def _only(features: Mapping[str, Any], role: str, names: list[str], where: str) -> str:
    if len(names) == 1:
        return names[0]
    problem = f"the columns {', '.join(map(repr, names))} could each be {role}"
    raise ValueError(_message(features, where, problem))


def _image_column(features: Mapping[str, Any], names: list[str], roles: Mapping[str, str], where: str) -> str:
    """By name; where no name is known, the one image column that is left."""
    left = names or [name for name in features if name not in roles.values() and is_image(features[name])]
    if not left:
        raise ValueError(_message(features, where, "no column is left that could be the image"))
    return _only(features, "image", left, where)


def _message(features: Mapping[str, Any], where: str, problem: str) -> str:
    listing = "\n".join(f"  {name}: {describe(feature)}" for name, feature in features.items())
    images = [name for name, feature in features.items() if is_image(feature)]
    image, truth = (*images, "IMAGE_COLUMN", "MAP_COLUMN")[:2] if len(images) != 1 else (images[0], "MAP_COLUMN")
    return (
        f"{where}: {problem}. Its columns are\n{listing}\nSay which column holds what, such as "
        f"columns={{'image': {image!r}, 'semantic_map': {truth!r}}}, on the command line "
        f"--dataset-options 'columns={{image: {image}, semantic_map: {truth}}}'. The roles are {', '.join(ROLES)}"
    )
