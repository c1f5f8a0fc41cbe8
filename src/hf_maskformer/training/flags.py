"""The command-line flags of `TrainConfig`: one for each field, with its help."""

import dataclasses
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from typing import Any

from hf_maskformer.training.config import TrainConfig, checked_fields, field_types
from hf_maskformer.training.option_values import flag_form, key_values, without_none


def add_flags(parser: ArgumentParser) -> None:
    """One flag per field; a flag that is not given leaves no attribute, so that a recipe's value stands."""
    hints = field_types()
    for entry in dataclasses.fields(TrainConfig):
        inner, _ = without_none(hints[entry.name])
        flag = "--" + entry.name.replace("_", "-")
        default = "" if entry.default in (None, dataclasses.MISSING) else f" (default: {entry.default})"
        help_text = (entry.metadata["help"] + default).replace("%", "%%")
        keywords: dict[str, Any] = {"dest": entry.name, "default": SUPPRESS, "help": help_text}
        if inner is bool:
            keywords["action"] = BooleanOptionalAction
        else:
            keywords.update(flag_form(inner))
        parser.add_argument(flag, **keywords)


def parsed_flags(namespace: Any) -> dict[str, Any]:
    """The fields given on the command line, converted; errors name the flag and what is allowed."""
    hints = field_types()
    given = {}
    for name, value in vars(namespace).items():
        if name not in hints:
            continue
        inner, _ = without_none(hints[name])
        given[name] = key_values(value) if typing.get_origin(inner) is dict else value
    return checked_fields(given, "command line")
