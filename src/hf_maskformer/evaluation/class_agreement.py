"""Whether a checkpoint means the same classes as a data set: another order gives the numbers of a bad model."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from hf_maskformer.model.label_spec import LabelSpec

PLACEHOLDER = re.compile(r"label_\d+", re.IGNORECASE)  # what is written where nobody gave names
SHOWN_DIFFERENCES = 3

logger = logging.getLogger(__name__)


def check_class_names(
    holder: str, id2label: Mapping[Any, str], label_spec: LabelSpec, ignore_names: bool = False
) -> None:
    """Raises ValueError if the classes that `holder` ("model") stores are not the data's.

    The rule, in this order:

    - the number of classes must be the same;
    - where one side has no names (LABEL_0, LABEL_1, ...) or `ignore_names` is set, class k of the model is taken for
      class k of the data, with a warning;
    - names that share a spelling agree: capitals, spaces, hyphens and underscores do not count, and of a list of
      synonyms ("road, route") one is enough;
    - names that do not agree are an error, with its own message if they are the data's in another order.
    """
    stored = [str(id2label[label]) for label in sorted(id2label, key=int)]
    expected = [label_spec.id2label[label] for label in sorted(label_spec.id2label)]
    if len(stored) != len(expected):
        raise ValueError(f"the {holder} has {len(stored)} classes but the data {len(expected)}")
    different = [k for k, (one, other) in enumerate(zip(stored, expected, strict=True)) if not _agree(one, other)]
    if not different:
        return
    for name, names in ((holder, stored), ("data", expected)):
        if all(PLACEHOLDER.fullmatch(entry) for entry in names):
            logger.warning(
                "the %s names no classes (%s, ...): class k is taken for class k of the other", name, names[0]
            )
            return
    if ignore_names:
        logger.warning("class names are not compared: %s", _differences(holder, stored, expected, different))
        return
    if sorted(map(_spelling, stored)) == sorted(map(_spelling, expected)):
        raise ValueError(f"the {holder} has the data's classes in another order: {stored}, data: {expected}")
    raise ValueError(
        f"the {holder} has other classes than the data: {_differences(holder, stored, expected, different)}. If only "
        "the names differ, evaluate with ignore_class_names=True (--ignore-class-names)"
    )


def _differences(holder: str, stored: list[str], expected: list[str], different: list[int]) -> str:
    shown = [
        f"{k} is {stored[k]!r} in the {holder} and {expected[k]!r} in the data" for k in different[:SHOWN_DIFFERENCES]
    ]
    more = len(different) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _agree(one: str, other: str) -> bool:
    return one == other or bool(_spellings(one) & _spellings(other))


def _spellings(name: str) -> set[str]:
    """The synonyms of a name, compared without regard to writing."""
    return {_spelling(part) for part in re.split(r"[,;]", name)} - {""}


def _spelling(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
