"""Lines of a batch: what one of the input file asks, and the one of the output or error file that answers it.

In, one JSON object a line: ``{"custom_id", "method": "POST", "url": "/v1/videos", "body": {...}}``. Out:
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": {"code", "message"}}``, where
response or error may be null.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from server.api.fields import Pairs, is_storable, parse_object
from server.api.schemas import VideoObject
from server.batches.model import BatchStatus
from server.batches.repository import LineResult
from server.errors import RequestRefusedError
from server.jobs.model import JobStatus

__all__ = ["AnsweredLine", "LineRequest", "answer_line", "read_line"]

MAX_CUSTOM_ID = 512
_KEYS = ("custom_id", "method", "url", "body")
_UNDONE = {
    BatchStatus.EXPIRED: ("batch_expired", "The completion window of the batch ended before this line was done."),
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before this line was done."),
}


@dataclass(frozen=True)
class LineRequest:
    """What a line asks for: its name within the batch, and the fields of its body, which are not checked yet."""

    custom_id: str
    body: Pairs


@dataclass(frozen=True)
class AnsweredLine:
    """A line of the output file, or of the error file, with its end of line."""

    is_output: bool
    text: bytes


def read_line(line: bytes, *, endpoint: str) -> LineRequest:
    """Read a line and check its form.

    Args:
        endpoint: What its url must be.

    Raises:
        RequestRefusedError: It has not the form above; names the key.
    """
    values: dict[str, Any] = {}
    for key, value in parse_object(line, what="The line"):
        if key not in _KEYS:
            shown = key[:80] if is_storable(key) else "?"
            message = f"{shown}: is not a known key of a line; allowed: {', '.join(_KEYS)}"
            raise RequestRefusedError(message, param=shown, code="unknown_key")
        if key in values:
            raise _refused(key, "is given more than once")
        values[key] = value
    for key in _KEYS:
        if key not in values:
            raise _refused(key, f"is required; each line has {', '.join(_KEYS)}")
    custom_id, body = values["custom_id"], values["body"]
    if not (isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_CUSTOM_ID and is_storable(custom_id)):
        raise _refused("custom_id", f"must be text of 1 to {MAX_CUSTOM_ID} characters, without zero bytes")
    if values["method"] != "POST":
        raise _refused("method", f"must be POST, got {_shown(values['method'])}")
    if values["url"] != endpoint:
        raise _refused("url", f"must be the endpoint of the batch, {endpoint}, got {_shown(values['url'])}")
    if not isinstance(body, Pairs):
        raise _refused("body", "must be an object")
    return LineRequest(custom_id, body)


def answer_line(batch_id: str, result: LineResult, *, end: BatchStatus) -> AnsweredLine:
    """What came of a line. The same line of the same batch always has the same id.

    Args:
        end: State that the batch is about to take.
    """
    key = hashlib.sha256(f"{batch_id}:{result.line}".encode()).hexdigest()[:32]
    request_id = f"req_{key[:24]}"
    response: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    job = result.job
    is_output = False
    if result.refusal is not None:
        response = {"request_id": request_id, **result.refusal}
    elif job is None and result.has_job:
        error = {"code": "video_deleted", "message": "The video was deleted before the batch ended."}
    elif job is None or job.status is JobStatus.CANCELED:
        code, message = _UNDONE.get(end, ("cancelled", "The video was cancelled."))
        error = {"code": code, "message": message}
    else:
        is_output = job.status is JobStatus.SUCCEEDED
        body = VideoObject.of(job).model_dump(mode="json")
        if is_output:
            body["content_url"] = f"/v1/videos/{job.id}/content"
        elif job.error_code is not None:
            error = {"code": job.error_code, "message": job.error_message or job.error_code}
        response = {"status_code": 200, "request_id": request_id, "body": body}
    answer = {"id": f"batch_req_{key}", "custom_id": result.custom_id, "response": response, "error": error}
    return AnsweredLine(is_output, json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refused(key: str, message: str) -> RequestRefusedError:
    return RequestRefusedError(f"{key}: {message}", param=key, code=f"invalid_{key}")
