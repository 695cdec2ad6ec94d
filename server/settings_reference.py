"""The settings as a page of the documentation, and as a file of environment variables; both made from the code.

``./run settings`` writes docs/settings.md and the part of .env.example below its mark.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from server.settings import ENV_PREFIX, FILE_SUFFIX, Settings, secret_files

__all__ = ["ENV_MARK", "SettingDescription", "describe_settings", "env_lines", "markdown_page"]

ENV_MARK = "# ---- Settings of the server: written by `./run settings`, change them above or uncomment them here ----"

_HEAD = """# Settings

What the operator decides: environment variables, read once when a process starts. An unknown `MEDSORA_*` variable is an
error that names the nearest known one, and so is a value out of range. Options of the command line win.

Each secret can come from a file instead: `MEDSORA_REDIS_PASSWORD_FILE=/run/secrets/redis_password` names
a file whose text is the value. Setting both is an error. Lists are separated by commas.

This page is made from `server/settings.py` by `./run settings`; an installed server prints it by
`medsora-server settings`.

| variable | type and range | default | meaning |
|---|---|---|---|
"""


@dataclass(frozen=True)
class SettingDescription:
    """One setting, in words."""

    variable: str
    kind: str
    """Type, allowed values and bounds."""
    default: str
    """As it would be written in the environment; empty: none."""
    meaning: str
    is_secret: bool


def describe_settings() -> Iterator[SettingDescription]:
    """All settings, in the order of the code."""
    secrets = set(secret_files().values())
    for name, field in Settings.model_fields.items():
        yield SettingDescription(
            variable=ENV_PREFIX + name.upper(),
            kind=_kind(field),
            default=_written(field.default),
            meaning=" ".join((field.description or "").split()),
            is_secret=name in secrets,
        )


def markdown_page() -> str:
    """The page docs/settings.md."""
    rows = []
    for one in describe_settings():
        default = f"`{one.default}`" if one.default else "none"
        name = f"`{one.variable}`" + (f", `\u2026{FILE_SUFFIX}`" if one.is_secret else "")
        rows.append(f"| {name} | {one.kind} | {default} | {one.meaning} |".replace("|none|", "| none |"))
    return _HEAD + "\n".join(rows) + "\n"


def env_lines() -> str:
    """All settings with their defaults as comments, for a file of environment variables."""
    lines = [ENV_MARK]
    for one in describe_settings():
        variable = one.variable + (FILE_SUFFIX if one.is_secret else "")
        kind = "name of a file that holds it" if one.is_secret else one.kind.replace("`", "")
        lines += ["", f"# {one.meaning}", f"# ({kind})", f"#{variable}={one.default}"]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return str(value)


def _kind(field: FieldInfo) -> str:
    annotation = _without_none(field.annotation)
    words = [_type_words(annotation), *_bounds(field)]
    return ", ".join(word for word in words if word)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _type_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_words(get_args(annotation)[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is tuple:
        return "list of " + _type_words(get_args(annotation)[0])
    return {SecretStr: "secret", bool: "`true` or `false`", int: "integer", float: "number"}.get(
        annotation, "path" if getattr(annotation, "__name__", "") == "Path" else "text"
    )


def _bounds(field: FieldInfo) -> Iterator[str]:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for bound in field.metadata:
        for attribute, word in words.items():
            limit = getattr(bound, attribute, None)
            if limit is not None:
                yield f"{word} {limit:,}".replace(",", " ") if isinstance(limit, int) else f"{word} {limit:g}"
        pattern = getattr(bound, "pattern", None)
        if pattern is not None:
            yield "pattern `" + str(pattern).replace("|", "\\|") + "`"
