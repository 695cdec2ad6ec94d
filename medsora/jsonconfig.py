"""Frozen dataclasses to and from JSON, with unknown, missing or mistyped keys refused.

One small converter for the two JSON files of a checkpoint (``config.json`` and ``manifest.json``), so that
both are equally strict. Supported field types: str, int, float, bool, dict, tuple, Any, optional ones and
dataclasses. Torch-free.
"""

import dataclasses
import types
import typing
from typing import Any

__all__ = ["from_json", "to_json"]

_T = typing.TypeVar("_T")


def to_json(value: Any) -> Any:
    """Convert a dataclass (nested as it may be) to plain JSON types; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[_T], value: Any, *, where: str) -> _T:
    """Build a ``kind`` from plain JSON types.

    Args:
        where: Name of the value for error messages, e.g. ``"config.json"``.

    Raises:
        ValueError: An unknown, missing or mistyped key; the message names it.
    """
    return typing.cast(_T, _convert(kind, value, where))


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(arg for arg in arguments if arg is not type(None)), value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {type(value).__name__}")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # an integer too large for a float, or 1e999, which parses as infinity
        if not -1e300 < value < 1e300:
            raise ValueError(f"{where} must be a finite number")
        return float(value)
    # bool is an int to isinstance: "true" where a count belongs is a mistake, not 1
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, not {type(value).__name__}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(arguments) != len(value):
        raise ValueError(f"{where} must have {len(arguments)} items, not {len(value)}")
    items = zip(arguments, value, strict=True)
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(items))


def _convert_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    if missing:
        raise ValueError(f"{where} lacks keys: {', '.join(missing)}")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _convert(kinds[name], item, f"{where}.{name}") for name, item in value.items()})
