"""The bodies of new videos and remixes: multipart, urlencoded or JSON, to one checked set of fields.

OpenAI's client sends every request as multipart and flattens ``extra_body`` into fields: lists arrive as
``name[]``, objects as ``name[key]``. Servers of this kind also take ``extra_params`` or ``extra_body`` as JSON
text. All of these end in the same fields here, and a field that cannot be honoured is refused by name, unless its
value asks for nothing.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from server.api.handlers import first_problem
from server.errors import RequestRefusedError, ServiceError
from server.jobs.model import MOST_PRIORITY
from server.jobs.service import VideoOrder
from server.sources.service import SourceOrder

__all__ = [
    "CreateVideoFields",
    "EditVideoFields",
    "ExtendVideoFields",
    "Pairs",
    "Real",
    "RemixVideoFields",
    "UnsupportedMediaTypeError",
    "Whole",
    "check_fields",
    "is_storable",
    "order_of",
    "parse_object",
    "parse_size",
    "read_edit",
    "read_extension",
    "read_json_object",
    "read_order",
    "read_remix",
]

MAX_URL = 20_971_520
"""Characters of a data: URL, as in OpenAI's contract."""
MAX_PARTS = 64
MAX_FILES = 4
_Fields = TypeVar("_Fields", bound=BaseModel)
_NESTED = ("extra_params", "extra_body")
_FLATTENED = re.compile(r"(?P<base>[^\[\]]+)(?P<keys>(?:\[[^\[\]]*\])+)")
_KEY = re.compile(r"\[([^\[\]]*)\]")
_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written, so that a name given twice is seen, and ``{}`` is not ``[]``."""


@dataclass(frozen=True)
class UploadedPart:
    """A file that came as part of a form; its name and type are the client's word, and are not kept."""

    content: bytes


class UnsupportedMediaTypeError(ServiceError):
    """The body is of a kind that is not read here."""

    status_code = 415
    kind = "invalid_request_error"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _number_text(value: Any) -> Any:
    """OpenAI writes seconds as text; clients also send the number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
One = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1)]
Real = Annotated[float, BeforeValidator(_no_bool)]


_REFERENCE_OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "maxLength": MAX_URL}, "file_id": {"type": "string"}},
    "additionalProperties": False,
}
_VIDEO_OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"id": {"type": "string"}},
    "required": ["id"],
    "additionalProperties": False,
}


class CreateVideoFields(BaseModel):
    """Fields of a new video. What is allowed for a model is listed in GET /v1/models."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="Name or synonym of one of the model's labels, at most 32000 characters.")
    model: str | None = Field(None, min_length=1, description="Name of a model; left out: the server's default.")
    size: str | None = Field(None, description="Width and height in pixels, such as 128x128.")
    seconds: Annotated[str, BeforeValidator(_number_text)] | None = Field(
        None, description="Length of the video in seconds, as text or number."
    )
    seed: Whole | None = Field(
        None,
        description="0 to 2**63-1. The same seed and fields give the same video, but for rounding; left out: drawn and "
        "told.",
    )
    num_inference_steps: Whole | None = Field(None, description="Steps of the sampler.")
    guidance_scale: Real | None = Field(None, description="Strength of classifier-free guidance; 1 is none.")
    sampler: str | None = Field(None, description="Name of the sampler.")
    width: Whole | None = Field(None, description="Pixels; together with height another way to say size.")
    height: Whole | None = Field(None, description="Pixels; together with width another way to say size.")
    num_frames: Whole | None = Field(None, description="Frames of the video; another way to say seconds.")
    fps: Real | None = Field(None, description="Frames a second; only the model's own rate is possible.")
    webhook_url: str | None = Field(
        None,
        max_length=2000,
        description="Where to tell of the end of this video, besides the webhooks of /v1/webhooks.",
    )
    webhook_secret: str | None = Field(
        None,
        max_length=200,
        description="With webhook_url: what its message is signed with, whsec_ and 24 to 64 bytes in base64.",
    )
    priority: Whole | None = Field(
        None,
        ge=-MOST_PRIORITY,
        le=MOST_PRIORITY,
        description="Higher comes sooner among one's own videos that wait; left out: 0, in a batch -5.",
    )
    deterministic: bool | None = Field(
        None,
        description="true: sampled alone, so that the same seed and fields give the same bytes whatever else is asked "
        "for; left out: sampled together with others where that is faster, which rounds differently.",
    )
    n: One | None = Field(None, description="Number of videos; only 1.")
    num_outputs_per_prompt: One | None = Field(None, description="As n; only 1.")
    input_reference: Any = Field(
        None,
        description="What the video begins with: a picture or a short video, of the video's size. A file part, or "
        "an object with image_url (a data: URL) or file_id.",
        json_schema_extra={"anyOf": [{"type": "string", "format": "binary"}, _REFERENCE_OBJECT, {"type": "null"}]},
    )
    input_reference_url: str | None = Field(None, description="As input_reference.image_url.")
    reference_url: str | None = Field(None, description="As input_reference.image_url.")
    image_url: str | None = Field(None, description="As input_reference.image_url.")


class _FromVideoFields(BaseModel):
    """What edits and extensions have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="Name or synonym of one of the model's labels, at most 32000 characters.")
    video: Any = Field(
        None,
        description="The video: a file part (MP4 or WebM), or an object with the id of a completed video.",
        json_schema_extra={"anyOf": [{"type": "string", "format": "binary"}, _VIDEO_OBJECT, {"type": "null"}]},
    )
    video_id: str | None = Field(None, description="Id of a completed video; another way to say video.")
    model: str | None = Field(None, min_length=1, description="Name of a model; left out: that of the video.")
    seed: Whole | None = Field(None, description="0 to 2**63-1; left out: drawn and told.")
    num_inference_steps: Whole | None = Field(None, description="Steps of the sampler; left out: those of the video.")
    guidance_scale: Real | None = Field(None, description="Strength of guidance; left out: that of the video.")
    sampler: str | None = Field(None, description="Name of the sampler; left out: that of the video.")


class EditVideoFields(_FromVideoFields):
    """Fields of an edit. Length and size are those of the video."""

    strength: Real | None = Field(
        None,
        description="How much is made anew: above 0, where the video stays, below 1, where nothing of it does. "
        "Default 0.6.",
    )


class ExtendVideoFields(_FromVideoFields):
    """Fields of an extension. The size is that of the video."""

    seconds: Annotated[str, BeforeValidator(_number_text)] | None = Field(
        None, description="Length of what is new, in seconds, as text or number."
    )
    num_frames: Whole | None = Field(None, description="Frames of what is new; another way to say seconds.")


class RemixVideoFields(BaseModel):
    """Fields of a remix: everything but the label is taken from the video that is remixed."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="Name or synonym of one of the model's labels, at most 32000 characters.")


@dataclass(frozen=True)
class _Unsupported:
    """A field that cannot be honoured."""

    reason: str
    neutral: tuple[str | float, ...] = ()
    """Values that ask for nothing, and pass; null, false and what is empty always do."""


_OTHER_ENDPOINTS = (
    "to begin with a picture or video give input_reference; edits and extensions have endpoints of their own"
)
_MEDIA = ("input_reference", "video")
"""Fields that may be a file or an object."""
_UNSUPPORTED = {
    **dict.fromkeys(("image", "video", "video_id"), _Unsupported(_OTHER_ENDPOINTS)),
    "characters": _Unsupported("the served checkpoints have no characters"),
    "negative_prompt": _Unsupported("the models are conditioned on labels and have no negative prompt"),
    "flow_shift": _Unsupported("the schedule of the sampler is fixed by the checkpoint", (1.0,)),
    "true_cfg_scale": _Unsupported("there is one guidance, guidance_scale", (1.0,)),
    "guidance_scale_2": _Unsupported("there is one guidance, guidance_scale"),
    "enable_teacache": _Unsupported("every step is computed"),
    "lora": _Unsupported("adapters cannot be loaded"),
    "quality": _Unsupported("there is one quality", ("standard",)),
    "user": _Unsupported("requests carry no user"),
    "metadata": _Unsupported("requests carry no metadata"),
    "return_stage_metrics": _Unsupported("stage times are in GET /metrics"),
    "remix_video_id": _Unsupported("remixes are asked for with POST /v1/videos/{video_id}/remix"),
    "stream": _Unsupported("answers are not streamed; ask for the video again until it is completed"),
}
"""Fields known from OpenAI or servers of this kind -> why they are refused."""


async def read_order(request: Request) -> tuple[VideoOrder, SourceOrder | None]:
    """Read and check the body of a new video; returns also what it is to begin with.

    Raises:
        ServiceError: It is of no known type, cannot be parsed, or has a field that is unknown, given twice,
            of a wrong type, or cannot be honoured. The error names the field.
    """
    return order_of(await _read_pairs(request))


def order_of(pairs: list[tuple[str, Any]]) -> tuple[VideoOrder, SourceOrder | None]:
    """Check the fields of a new video, whether they came in a request or in a line of a batch.

    Raises:
        RequestRefusedError: As :func:`read_order`.
    """
    checked = _check(CreateVideoFields, _collect(pairs))
    urls = ("input_reference_url", "reference_url", "image_url")
    values = checked.model_dump(exclude={"size", "n", "num_outputs_per_prompt", "input_reference", *urls})
    order = VideoOrder(size=parse_size(checked.size), **values)
    given = {name: getattr(checked, name) for name in ("input_reference", *urls) if getattr(checked, name) is not None}
    if len(given) > 1:
        other = list(given)[1]
        raise _refused(other, f"{other}: says the same as {next(iter(given))}; allowed: one of them")
    for name, value in given.items():
        return order, _reference(name, value)
    return order, None


async def read_edit(request: Request) -> tuple[VideoOrder, SourceOrder, float | None]:
    """Read and check the body of an edit; returns also the video and the strength.

    Raises:
        ServiceError: As :func:`read_order`; also for a field that an edit takes from the video.
    """
    checked = _check(EditVideoFields, _collect_from_video(EditVideoFields, await _read_pairs(request)))
    values = checked.model_dump(exclude={"video", "video_id", "strength"})
    return VideoOrder(**values), _video(checked), checked.strength


async def read_extension(request: Request) -> tuple[VideoOrder, SourceOrder]:
    """Read and check the body of an extension; returns also the video.

    Raises:
        ServiceError: As :func:`read_order`; also for a field that an extension takes from the video.
    """
    checked = _check(ExtendVideoFields, _collect_from_video(ExtendVideoFields, await _read_pairs(request)))
    if checked.seconds is not None and checked.num_frames is not None:
        raise _refused("num_frames", "num_frames: says the same as seconds; allowed: one of them")
    return VideoOrder(**checked.model_dump(exclude={"video", "video_id"})), _video(checked)


def _collect_from_video(model: type[_FromVideoFields], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        if name in CreateVideoFields.model_fields and name not in model.model_fields:
            raise _refused(name, f"{name}: is taken from the video; allowed: {', '.join(model.model_fields)}")
    return _collect(pairs, model=model)


def _reference(field: str, value: Any) -> SourceOrder:
    """What a video begins with."""
    if isinstance(value, UploadedPart):
        return SourceOrder(field=field, content=value.content)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse_json(value.encode(), what=field)
    if isinstance(value, str):
        return SourceOrder(field=field, content=_from_data_url(field, value))
    parts = _members(field, value, ("image_url", "file_id"))
    if len(parts) != 1:
        raise _refused(field, f"{field}: must have image_url or file_id, and not both")
    if "file_id" in parts:
        return SourceOrder(field=field, file_id=parts["file_id"])
    return SourceOrder(field=field, content=_from_data_url(field, parts["image_url"]))


def _video(fields: _FromVideoFields) -> SourceOrder:
    """The video of an edit or extension."""
    value = fields.video
    if isinstance(value, UploadedPart) and not value.content and fields.video_id is not None:
        value = None  # clients that can send the id only beside a file send an empty one
    if value is not None and fields.video_id is not None:
        raise _refused("video_id", "video_id: says the same as video; allowed: one of them")
    if isinstance(value, UploadedPart):
        return SourceOrder(field="video", content=value.content)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse_json(value.encode(), what="video")
    video_id = fields.video_id if value is None else _members("video", value, ("id",)).get("id")
    if video_id is None:
        raise _refused("video", "video: is required: a file, or an object with the id of a completed video")
    return SourceOrder(field="video", video_id=video_id)


def _members(field: str, value: Any, allowed: tuple[str, ...]) -> dict[str, str]:
    """An object of texts."""
    value = _plain(value)
    if not isinstance(value, dict):
        raise _refused(field, f"{field}: must be a file, or an object with {' or '.join(allowed)}")
    for name, member in value.items():
        if name not in allowed or not isinstance(member, str):
            raise _refused(field, f"{field}: may have {' or '.join(allowed)}, as text; got {name[:80]!r}")
    return value


def _from_data_url(field: str, url: str) -> bytes:
    """The bytes that a data: URL holds."""
    if len(url) > MAX_URL:
        raise _refused(field, f"{field}: has {len(url)} characters; allowed: up to {MAX_URL}")
    head, comma, text = url.partition(",")
    if not head.lower().startswith("data:"):
        message = f"{field}: is no data: URL; other addresses are not fetched: send the file, or a data: URL of it"
        raise _refused(field, message)
    if not (comma and head.lower().endswith(";base64")):
        raise _refused(field, f"{field}: must be a data: URL in base64, such as data:image/png;base64,...")
    try:
        return base64.b64decode(unquote(text), validate=True)
    except (binascii.Error, ValueError):
        raise _refused(field, f"{field}: is no valid base64") from None


async def read_remix(request: Request) -> str:
    """Read and check the body of a remix; returns the prompt.

    Raises:
        ServiceError: As :func:`read_order`; also for a field that a remix takes from its source.
    """
    fields = _collect(await _read_pairs(request))
    for name in fields:
        if name not in RemixVideoFields.model_fields:
            raise _refused(name, f"{name}: is taken from the video that is remixed; allowed: prompt")
    return _check(RemixVideoFields, fields).prompt


def _check(model: type[_Fields], fields: dict[str, Any]) -> _Fields:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        param, message = first_problem([dict(entry) for entry in error.errors(include_url=False)])
        if param == "prompt" and "prompt" not in fields:
            message = "prompt: is required; it names a label of the model, see GET /v1/models"
        raise _refused(str(param), message) from None


def check_fields(model: type[_Fields], fields: dict[str, Any]) -> _Fields:
    """Check fields that were read against a model.

    Raises:
        RequestRefusedError: Names the first field that is wrong, missing or unknown.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        entry = dict(error.errors(include_url=False)[0])
        param, message = first_problem([entry])
        if entry["type"] == "missing":
            raise _refused(_dotted(entry), f"{_dotted(entry)}: is required") from None
        if entry["type"] == "extra_forbidden":
            allowed = ", ".join(model.model_fields)
            message = f"{str(param)[:80]}: is not a known field; allowed: {allowed}"
            raise RequestRefusedError(message, param=str(param)[:80], code="unknown_field") from None
        raise _refused(str(param), message) from None


def _dotted(entry: dict[str, Any]) -> str:
    return ".".join(str(part) for part in entry["loc"])


async def read_json_object(request: Request) -> dict[str, Any]:
    """Read a body that is a JSON object.

    Raises:
        ServiceError: It is no JSON object, or an object in it has a name twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"content-type: {kind[:80]!r} is not read here; allowed: application/json"
        raise UnsupportedMediaTypeError(message, param="content-type", code="unsupported_media_type")
    values: dict[str, Any] = _plain(parse_object(await request.body()))
    return values


def _plain(value: Any) -> Any:
    """Dictionaries in place of :class:`Pairs`."""
    if isinstance(value, Pairs):
        names = [name for name, _ in value]
        for name in names:
            if not is_storable(name):
                raise RequestRefusedError("A field has a name that is no text.", code="unknown_field")
            if names.count(name) > 1:
                raise _refused(name, f"{name[:80]}: is given more than once")
        return {name: _plain(one) for name, one in value}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


async def _read_pairs(request: Request) -> list[tuple[str, Any]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return parse_object(await request.body())
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form_pairs(request)
    message = f"content-type: {kind[:80]!r} is not read here; allowed: multipart/form-data, application/json"
    raise UnsupportedMediaTypeError(message, param="content-type", code="unsupported_media_type")


def parse_object(body: bytes, *, what: str = "The body") -> Pairs:
    """Parse a JSON object; those within it become :class:`Pairs` too.

    Raises:
        RequestRefusedError: It is no JSON, or no object. ``what`` says in the message of what.
    """
    value = _parse_json(body, what=what)
    if not isinstance(value, Pairs):
        raise RequestRefusedError(f"{what} must be a JSON object.", code="invalid_json")
    return value


async def _form_pairs(request: Request) -> list[tuple[str, Any]]:
    # Starlette answers 400 with a plain message to a broken body and to more parts than these.
    async with request.form(max_files=MAX_FILES, max_fields=MAX_PARTS) as form:
        pairs: list[tuple[str, Any]] = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in _MEDIA:
                    raise _refused(name, f"{name[:80]}: must be text, got a file")
                pairs.append((name, UploadedPart(await value.read())))
                continue
            pairs.append(_unflatten(name, value))
        return pairs


def _unflatten(name: str, value: Any) -> tuple[str, Any]:
    """The field that a part of a form is of, and what it says: ``a[]`` is of a list, ``a[key]`` of an object."""
    match = _FLATTENED.fullmatch(name)
    if match is None:
        return name, value
    for key in reversed(_KEY.findall(match["keys"])):
        value = Pairs([(key, value)]) if key else [value]
    return match["base"], value


def _collect(
    pairs: list[tuple[str, Any]], *, model: type[BaseModel] = CreateVideoFields, inside: str = ""
) -> dict[str, Any]:
    """Fields by name, with nested ones lifted; refuses what is unknown, unsupported or given twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in _NESTED and not inside:
            if value is None:
                continue
            for nested_name, nested_value in _nested(name, value, model).items():
                _put(fields, nested_name, nested_value)
            continue
        if not is_storable(name):
            raise RequestRefusedError("A field has a name that is no text.", code="unknown_field")
        if name in _UNSUPPORTED and name not in model.model_fields:
            if _asks_for_something(value, _UNSUPPORTED[name].neutral):
                raise _refused(name, f"{name}: is not supported: {_UNSUPPORTED[name].reason}")
            continue
        if name not in model.model_fields:
            allowed = ", ".join(model.model_fields)
            raise RequestRefusedError(
                f"{name[:80]}: is not a known field; allowed: {allowed}", param=name[:80], code="unknown_field"
            )
        if name in _MEDIA:
            if not _asks_for_something(value, ()):
                continue
        elif isinstance(value, list):
            kind = "an object" if isinstance(value, Pairs) else "a list"
            raise _refused(name, f"{name}: must be one value, got {kind}")
        _put(fields, name, value)
    return fields


def _asks_for_something(value: Any, neutral: tuple[str | float, ...]) -> bool:
    if isinstance(value, str):  # in forms all is text
        if value in neutral:
            return False
        if value.strip().lower() in ("", "null", "none", "false", "[]", "{}"):
            return False
        try:
            value = float(value)
        except ValueError:
            return True
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value not in neutral
    return value is not None and value is not False and value != []


def _nested(name: str, value: Any, model: type[BaseModel]) -> dict[str, Any]:
    if isinstance(value, str):
        value = _parse_json(value.encode(), what=name)
    if not isinstance(value, Pairs):
        raise _refused(name, f"{name}: must be a JSON object")
    return _collect(value, model=model, inside=name)


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise _refused(name, f"{name}: is given more than once")
    if isinstance(value, str) and not is_storable(value):
        raise _refused(name, f"{name}: must be text without zero bytes or halves of surrogate pairs")
    if value is not None:
        fields[name] = value


def is_storable(text: str) -> bool:
    """Whether a database and an answer can hold it: JSON can escape what UTF-8 cannot say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _parse_json(body: bytes, *, what: str) -> Any:
    """Parse JSON; objects become :class:`Pairs`."""

    def refuse_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=Pairs, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:200]
        raise RequestRefusedError(f"{what} is no valid JSON: {reason}", code="invalid_json") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of a text such as ``128x128``.

    Raises:
        RequestRefusedError: It is none; names ``size``.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _refused("size", f"size: must be WIDTHxHEIGHT in pixels, such as 128x128, got {text[:80]!r}")
    return int(match[1]), int(match[2])


def _refused(param: str, message: str) -> RequestRefusedError:
    return RequestRefusedError(message, param=param[:80], code=f"invalid_{param[:80]}")
