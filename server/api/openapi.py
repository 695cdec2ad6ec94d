"""What the OpenAPI document says beyond what the framework finds by itself: bodies that are read by hand, the errors
of each endpoint, and where ids in answers lead to."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.api.schemas import ErrorEnvelope

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
            for path in ("/v1/videos", "/v1/videos/{video_id}/remix"):
                for body in document["paths"][path]["post"]["requestBody"]["content"].values():
                    properties = body["schema"]["properties"]
                    properties["prompt"]["examples"] = labels
                    if "model" in properties:
                        properties["model"]["examples"] = models
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


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
