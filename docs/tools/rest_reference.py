"""The REST reference, written from the OpenAPI document that the server itself serves.

python docs/tools/rest_reference.py    # prints it; the site makes it anew whenever it is built
"""

from __future__ import annotations

import sys
from typing import Any

from server.app import create_app
from server.settings import Settings

INTRODUCTION = """# REST reference

Every endpoint, field and answer, as the server describes them itself at `/openapi.json` (to try them by hand: `/docs`).
Where keys are in use, each request needs `Authorization: Bearer KEY` ([keys](keys.md)); every POST takes an
`Idempotency-Key`. Errors have one form, [ErrorEnvelope](#errorenvelope), and answers say by `x-should-retry` whether to
try again. How the parts work together is told on pages of their own: [recipes](recipes.md),
[videos from videos](from-video.md), [datasets](datasets.md), [batches](batches.md), [events](events.md),
[webhooks](webhooks.md).
"""
ABOUT = {
    "videos": "Videos",
    "events": "Events",
    "files": "Files",
    "batches": "Batches",
    "datasets": "Datasets",
    "webhooks": "Webhooks",
    "models": "Models",
    "usage": "Usage",
    "health": "Health and metrics",
}
OF_EVERY_ENDPOINT = {"401", "403", "429", "503"}


def document() -> dict[str, Any]:
    """What ``/openapi.json`` answers, with the shipped checkpoint."""
    described: dict[str, Any] = create_app(Settings(_env_file=None, redis_url="redis://localhost")).openapi()
    return described


def render(described: dict[str, Any] | None = None) -> str:
    """The page as Markdown."""
    described = described or document()
    parts = [INTRODUCTION]
    by_tag: dict[str, list[str]] = {}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append(_operation(method, path, operation))
    for tag in [*ABOUT, *sorted(set(by_tag) - set(ABOUT))]:
        if tag in by_tag:
            parts += [f"## {ABOUT.get(tag, tag.capitalize())}", *by_tag[tag]]
    parts.append("## Objects")
    for name, schema in sorted(described["components"]["schemas"].items()):
        parts.append(f"### {name}")
        if schema.get("description"):
            parts.append(_text(schema["description"]))
        if "enum" in schema:
            parts.append("One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".")
        if schema.get("properties"):
            parts.append(_fields(schema))
    return "\n\n".join(parts) + "\n"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"### `{method.upper()} {path}`", _text(operation.get("description") or operation.get("summary", ""))]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            (
                f"`{one['name']}`",
                one["in"] + (", required" if one.get("required") and one["in"] != "path" else ""),
                _type(one["schema"]),
                one.get("description") or one["schema"].get("description", ""),
            )
            for one in parameters
        ]
        parts.append(_table(("parameter", "in", "type", "meaning"), rows))
    body = operation.get("requestBody")
    if body:
        kinds = list(body["content"])
        schema = body["content"][kinds[-1]]["schema"]
        parts.append("Body: " + " or ".join(f"`{kind}`" for kind in kinds) + ".")
        parts.append(_fields(schema) if schema.get("properties") else _type(schema))
    answers, errors = [], []
    for status, answer in sorted(operation["responses"].items()):
        if status in OF_EVERY_ENDPOINT:
            continue
        if status >= "400":
            errors.append(f"`{status}`")
            continue
        shown = [
            _type(content["schema"]) if "json" in kind and content.get("schema") else f"`{kind}`"
            for kind, content in answer.get("content", {}).items()
        ]
        answers.append(f"`{status}` " + (", ".join(shown) or "without a body"))
    told = "Answers: " + "; ".join(answers) + "."
    if errors:
        told += " Errors: " + ", ".join(errors) + "."
    return "\n\n".join([*parts, told])


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", []))
    rows = [
        (
            f"`{name}`" + (" (required)" if name in required and "default" not in field else ""),
            _type(field),
            field.get("description", ""),
        )
        for name, field in schema["properties"].items()
    ]
    return _table(("field", "type", "meaning"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(_text(text).split()).replace("|", "\\|")


def _text(text: str) -> str:
    """Docstrings are reStructuredText in small things."""
    return text.replace("``", "`").strip()


def _type(schema: dict[str, Any]) -> str:
    """In a few words; objects by a link to where they are described."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    kind = str(schema.get("format") or schema.get("type") or "any")
    extra = schema.get("additionalProperties")
    if kind == "object" and isinstance(extra, dict):
        return f"object of {_type(extra)}"
    return {"binary": "file"}.get(kind, kind) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f", {low} to {high}"
    if low is not None:
        return f", at least {low}"
    return f", at most {high}" if high is not None else ""


if __name__ == "__main__":
    sys.stdout.write(render())
