"""Turn every error into OpenAI's envelope, whoever raised it."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.errors import RequestRefusedError, ServiceError, UnavailableError, error_body
from server.objects import StorageUnavailableError

__all__ = ["add_exception_handlers", "answer_of", "first_problem"]

logger = logging.getLogger(__name__)


def add_exception_handlers(app: FastAPI) -> None:
    """Install the handlers. Whatever they do not know becomes a 500 in ``RequestMiddleware``."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(DBAPIError, _on_database_error)
    app.add_exception_handler(PoolTimeoutError, _on_database_error)
    app.add_exception_handler(StorageUnavailableError, _on_storage_error)


def answer_of(error: ServiceError) -> JSONResponse:
    """The answer that tells a client of an error."""
    headers = dict(error.headers)
    if error.status_code == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.body(), status_code=error.status_code, headers=headers)


def _on_service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return answer_of(error)


def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = str(error.detail)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {request.url.path[:200]}."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["allow"] = ", ".join(_allowed_methods(request))
        message = f"{request.method} is not possible at {request.url.path[:200]}; allowed: {headers['allow']}"
    body = error_body(message, kind="invalid_request_error", code=code)
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Methods that some route takes at this path; the framework names those of one route only.

    Where an endpoint has just this path, such as /v1/videos/edits, those that would take its last part for an id do not
    count.
    """
    documented = request.app.openapi()["paths"].get(request.scope["path"])
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if (documented is None or method == "HEAD" or method.lower() in documented)
        and any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Query parameters; bodies are read by hand in ``fields.py``."""
    assert isinstance(error, RequestValidationError)
    param, message = first_problem(list(error.errors()))
    return answer_of(RequestRefusedError(message, param=param, code=f"invalid_{param}" if param else "invalid_request"))


def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("the database failed: %s", error)
    return answer_of(UnavailableError("The job database is not available now.", code="database_unavailable"))


def _on_storage_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("the file store failed: %s", error)
    return answer_of(UnavailableError("The file store is not available now.", code="storage_unavailable"))


def first_problem(problems: list[dict[str, object]]) -> tuple[str | None, str]:
    """(field, message) for the first of pydantic's error entries."""
    problem = problems[0]
    location = problem.get("loc", ())
    assert isinstance(location, tuple)
    names = [str(part) for part in location if part not in ("query", "path", "header", "body")]
    param = names[0] if names else None
    text = str(problem.get("msg", "is not valid")).removeprefix("Value error, ")
    given = repr(problem.get("input"))
    given = given if len(given) <= 80 else given[:77] + "..."
    message = f"{param}: {text}, got {given}" if param else text
    return param, message
