"""Errors that reach a client, in OpenAI's envelope: ``{"error": {message, type, param, code}}``."""

import re
from typing import Any

__all__ = [
    "ForbiddenError",
    "InProgressError",
    "NotFoundError",
    "NotReadyError",
    "OverloadedError",
    "QuotaExceededError",
    "RangeError",
    "RequestRefusedError",
    "ReusedKeyError",
    "ServiceError",
    "TooLargeError",
    "UnauthorizedError",
    "UnavailableError",
    "error_body",
    "without_folders",
]


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The envelope. ``kind`` becomes ``type``; ``param`` names the offending field."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_NAME = r"[^\s/:'\",]+"
_FOLDERS = re.compile(rf"(?<![\w/.])/(?![/\s])(?:{_NAME}(?: {_NAME})*/)*")
"""A slash that begins a path (not one within a word, a relative path or a URL) and the folders after it, whose names
may have spaces: rather a word too much is taken than a folder told."""


def without_folders(text: str) -> str:
    """``text`` with absolute paths cut down to their last part: where files lie is no client's business.

    >>> without_folders("/srv/models/small/denoiser.safetensors: is damaged")
    'denoiser.safetensors: is damaged'
    """
    return _FOLDERS.sub("", text)


class ServiceError(Exception):
    """Base of all errors that are told to a client.

    Args:
        message: What was given, what is allowed, what to do.
        code: Machine-readable reason.
        param: Field of the request that is to blame.
        headers: Extra response headers.
    """

    status_code = 500
    kind = "server_error"

    def __init__(
        self, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.param = message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The envelope of this error."""
        return error_body(self.message, kind=self.kind, param=self.param, code=self.code)


class RequestRefusedError(ServiceError):
    """The request is wrong and would be wrong again."""

    status_code = 400
    kind = "invalid_request_error"


class NotFoundError(ServiceError):
    """No such object."""

    status_code = 404
    kind = "invalid_request_error"


class UnauthorizedError(ServiceError):
    """It is not known who asks."""

    status_code = 401
    kind = "invalid_request_error"

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code, headers={"www-authenticate": 'Bearer realm="MedSora Server"'})


class ForbiddenError(ServiceError):
    """Who asks may not do that at all; of an object that is another's there is only :class:`NotFoundError`."""

    status_code = 403
    kind = "invalid_request_error"


class NotReadyError(ServiceError):
    """The object is not in the state that this needs; asking again at once does not help."""

    status_code = 409
    kind = "invalid_request_error"

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        # OpenAI's client retries 409 by itself unless told not to.
        super().__init__(message, code=code, param=param, headers={"x-should-retry": "false"})


class InProgressError(ServiceError):
    """The same is being done already; asking again a little later helps.

    Args:
        retry_after_ms: Milliseconds after which to try again.
    """

    status_code = 409
    kind = "invalid_request_error"

    def __init__(self, message: str, *, code: str, param: str, retry_after_ms: int) -> None:
        super().__init__(message, code=code, param=param, headers=_retry_headers(retry_after_ms))


class ReusedKeyError(ServiceError):
    """An Idempotency-Key that was used for another request."""

    status_code = 422
    kind = "invalid_request_error"


class TooLargeError(ServiceError):
    """The request body is larger than allowed."""

    status_code = 413
    kind = "invalid_request_error"


class RangeError(ServiceError):
    """The asked-for bytes do not exist."""

    status_code = 416
    kind = "invalid_request_error"


class OverloadedError(ServiceError):
    """Too much work waits; the same request may do later.

    Args:
        retry_after_ms: Milliseconds after which to try again.
    """

    status_code = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, code: str, retry_after_ms: int) -> None:
        super().__init__(message, code=code, headers=_retry_headers(retry_after_ms))


class QuotaExceededError(ServiceError):
    """A tenant has used up what it may have.

    Args:
        retry_after_s: Seconds after which there is more.
        is_soon: Whether a client should wait for that and try again by itself.
    """

    status_code = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, code: str, retry_after_s: float, is_soon: bool) -> None:
        headers = {**_retry_headers(round(retry_after_s * 1000)), "x-should-retry": str(is_soon).lower()}
        super().__init__(message, code=code, headers=headers)


class UnavailableError(ServiceError):
    """The server cannot do it now: database or disk. The job was not accepted.

    Args:
        retry_after_ms: Milliseconds after which to try again.
    """

    status_code = 503
    kind = "server_error"

    def __init__(self, message: str, *, code: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message, code=code, headers=_retry_headers(retry_after_ms))


def _retry_headers(retry_after_ms: int) -> dict[str, str]:
    return {
        "retry-after-ms": str(retry_after_ms),
        "retry-after": str(max(1, -(-retry_after_ms // 1000))),
        "x-should-retry": "true",
    }
