"""What the OpenAPI document says beyond what the framework finds by itself: bodies and headers that are read by hand,
the errors of each endpoint, headers of answers, and where ids in answers lead to."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.api.schemas import ErrorEnvelope
from server.idempotency import MAX_KEY

__all__ = ["error_responses", "install_openapi", "links", "operation_id", "request_body"]


def request_body(model: type[BaseModel], *content_types: str) -> dict[str, Any]:
    """``openapi_extra`` of an endpoint that reads a body of these types into a model by hand."""
    schema = inlined_schema(model)
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in content_types}}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of an endpoint that answers with these statuses and the envelope of errors."""
    return {status: {"model": ErrorEnvelope} for status in statuses}


def links(parameter: str, *operations: str) -> dict[int | str, dict[str, Any]]:
    """``responses`` of an endpoint whose answer has an ``id`` that these operations take as ``parameter``."""
    return {
        200: {
            "links": {
                name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}} for name in operations
            }
        }
    }


def operation_id(route: APIRoute) -> str:
    """The name of the function: short, and stable when a path changes."""
    return route.name


def install_openapi(app: FastAPI, *, labels: list[str], models: list[str]) -> None:
    """Let the application describe itself.

    Args:
        labels: Examples of what can be asked for.
        models: Examples of models, in the same document.
    """

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _drop_framework_errors(document)
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _add_headers(path, method, operation)
            for path in ("/v1/videos", "/v1/videos/{video_id}/remix"):
                for body in document["paths"][path]["post"]["requestBody"]["content"].values():
                    properties = body["schema"]["properties"]
                    properties["prompt"]["examples"] = labels
                    if "model" in properties:
                        properties["model"]["examples"] = models
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


_ERRORS = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}
_TEXT: dict[str, Any] = {"type": "string"}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Chosen by the client, for 24 hours: the same request with the same key is done once, and answered "
    "again. See docs/keys.md.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]+$"},
}
_OF_DOWNLOADS = {
    "Range": "Bytes that are asked for, one range; what is none, or several, is overlooked.",
    "If-Range": "An etag: the range counts only while it is that of the file.",
    "If-None-Match": "Etags of what the client has: one that is still that of the file is answered with 304.",
}
_RETRY: dict[str, tuple[str, dict[str, Any]]] = {
    "retry-after": ("Seconds after which to try again.", {"type": "integer"}),
    "retry-after-ms": ("The same in milliseconds, for OpenAI's client.", {"type": "integer"}),
    "x-should-retry": ("Whether to try again by itself.", {"type": "string", "enum": ["true", "false"]}),
}
_RATES: dict[str, tuple[str, dict[str, Any]]] = {
    "ratelimit-limit": ("Requests a minute that the tenant may make; absent where any number.", {"type": "integer"}),
    "ratelimit-remaining": ("Requests that are left.", {"type": "integer"}),
    "ratelimit-reset": ("Seconds until all are back.", {"type": "integer"}),
}


def _add_headers(path: str, method: str, operation: dict[str, Any]) -> None:
    """Headers that this operation heeds, and those of its answers."""
    responses = operation["responses"]
    parameters = []
    is_under_keys = path.startswith("/v1/")
    if method == "post" and is_under_keys:
        parameters.append(_KEY)
        responses.setdefault("400", {"description": "Bad Request", "content": _ERRORS})
        responses.setdefault("409", {"description": "Conflict", "content": _ERRORS})
        responses["422"] = {"description": "The Idempotency-Key was used for another request.", "content": _ERRORS}
        replayed = ("true: this was answered before, and nothing was made now.", {"type": "string", "enum": ["true"]})
        responses["200"].setdefault("headers", {})["idempotent-replayed"] = _header(*replayed)
    if "416" in responses:
        parameters += [
            {"name": name, "in": "header", "required": False, "description": about, "schema": _TEXT}
            for name, about in _OF_DOWNLOADS.items()
            if name != "If-None-Match" or "304" in responses
        ]
    if parameters:
        operation["parameters"] = [*operation.get("parameters", []), *parameters]
    for status, response in responses.items():
        told: dict[str, tuple[str, dict[str, Any]]] = {
            "x-request-id": ("Id of this request in the server's log.", _TEXT)
        }
        if is_under_keys:
            told |= _RATES
            if status in ("409", "429", "503"):
                told |= _RETRY
        headers = {name: _header(about, schema) for name, (about, schema) in told.items()}
        response["headers"] = {**headers, **response.get("headers", {})}


def _header(about: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": about, "schema": schema}


def _drop_framework_errors(document: dict[str, Any]) -> None:
    """Here a wrong parameter is answered with 400 and our envelope, not as the framework says."""
    for path in document["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a model without references: within a document they would lead nowhere."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(
                {**definitions[part["$ref"].rpartition("/")[2]], **{k: v for k, v in part.items() if k != "$ref"}}
            )
        return {name: inline(one) for name, one in part.items()}

    result: dict[str, Any] = inline(schema)
    return result
