"""Values of options as text or YAML gives them, and the types that dataclass fields want."""

import types
import typing
from typing import Any, Literal, Union

import yaml


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type inside `X | None` (a union where several are left), and whether None is allowed."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = typing.get_args(hint)
        inner = tuple(part for part in parts if part is not type(None))
        return Union[inner], len(inner) < len(parts)  # noqa: UP007 - made of a tuple; of one type it is that type
    return hint, False


def convert(value: Any, hint: Any) -> Any:
    """`value` (from YAML, JSON or a flag's text) as the annotated type; TypeError or ValueError where it is not one.

    YAML reads `1e-4` as a string, hence the conversion of text to numbers.
    """
    inner, optional = without_none(hint)
    if optional and (value is None or value in ("none", ["none"])):  # a flag of several words gives a list
        return None
    origin = typing.get_origin(inner)
    if origin is Union:
        return convert_to_one(value, typing.get_args(inner))
    if origin is Literal:
        if value is False and "no" in typing.get_args(inner):
            return "no"  # YAML 1.1 reads a bare `no` as False
        if value not in typing.get_args(inner):
            raise ValueError(value)
        return value
    if origin is tuple:
        parts = typing.get_args(inner)
        if isinstance(value, (list, tuple)) and Ellipsis in parts:
            parts = parts[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise ValueError(value)
        return tuple(convert(item, part) for item, part in zip(value, parts, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(value)
        return dict(value)
    return convert_scalar(value, inner)


def convert_to_one(value: Any, parts: tuple[Any, ...]) -> Any:
    """`value` as the first of several types that it can be."""
    for part in parts[:-1]:
        try:
            return convert(value, part)
        except (TypeError, ValueError):
            continue
    return convert(value, parts[-1])


def convert_scalar(value: Any, kind: type) -> Any:
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise TypeError(value)
    if kind is int and int(value) != float(value):
        raise ValueError(value)
    if kind is str and not isinstance(value, str):
        raise TypeError(value)
    return kind(value)


def describe(hint: Any) -> str:
    """A type in words, for help texts and errors."""
    inner, optional = without_none(hint)
    origin = typing.get_origin(inner)
    if origin is Union:
        text = " or ".join(describe(part) for part in typing.get_args(inner))
    elif origin is Literal:
        text = ", ".join(map(str, typing.get_args(inner)))
    elif origin is tuple:
        parts = typing.get_args(inner)
        text = f"{'several' if Ellipsis in parts else len(parts)} values of type {parts[0].__name__}"
    elif origin is dict:
        text = "KEY=VALUE pairs"
    else:
        text = inner.__name__
    return f"{text} or none" if optional else text


def flag_form(hint: Any) -> dict[str, Any]:
    """What `add_argument` is told of a type that is neither bool nor optional: how many words, and their name."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {"nargs": "+", "metavar": "KEY=VALUE"}
    if origin is tuple:
        return {"nargs": "+" if Ellipsis in parts else len(parts), "metavar": "VALUE"}
    if origin is Literal:
        return {"metavar": "|".join(parts)}
    if origin is Union:
        return {"metavar": "|".join(flag_form(part)["metavar"] for part in parts)}
    return {"metavar": hint.__name__.upper()}


def key_values(pairs: list[str]) -> dict[str, Any]:
    """`["a=1", "b=[2,3]"]` as a dict; values are read as YAML."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is not of the form KEY=VALUE")
        result[key] = yaml.safe_load(value)
    return result
