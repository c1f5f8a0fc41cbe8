"""Values of options as text or YAML gives them, and the types that dataclass fields want."""

import types
import typing
from typing import Any, Literal, Union

import yaml


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type inside `X | None`, and whether None is allowed."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0], True
    return hint, False


def convert(value: Any, hint: Any) -> Any:
    """`value` (from YAML, JSON or a flag's text) as the annotated type; TypeError or ValueError where it is not one.

    YAML reads `1e-4` as a string, hence the conversion of text to numbers.
    """
    inner, optional = without_none(hint)
    if optional and (value is None or value == "none"):
        return None
    origin = typing.get_origin(inner)
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
    if origin is Literal:
        text = ", ".join(map(str, typing.get_args(inner)))
    elif origin is tuple:
        parts = typing.get_args(inner)
        text = f"{'several' if Ellipsis in parts else len(parts)} values of type {parts[0].__name__}"
    elif origin is dict:
        text = "KEY=VALUE pairs"
    else:
        text = inner.__name__
    return f"{text} or none" if optional else text


def key_values(pairs: list[str]) -> dict[str, Any]:
    """`["a=1", "b=[2,3]"]` as a dict; values are read as YAML."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is not of the form KEY=VALUE")
        result[key] = yaml.safe_load(value)
    return result
