"""Receive an uploaded file: multipart, parsed as it arrives and written to its place on disk, never held in memory."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.api.fields import UnsupportedMediaTypeError, is_storable
from server.errors import RequestRefusedError, TooLargeError
from server.files.service import Upload

__all__ = ["UploadForm", "receive_upload"]

UPLOAD_OVERHEAD_BYTES = 64 * 1024
"""What the other parts of the body and the boundaries may take beside the file."""
MAX_FILENAME = 255
_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 16
_MAX_HEADER_BYTES = 8192
_PIECE_BYTES = 256 * 1024
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass
class UploadForm:
    """What came with a file: its name, and the text fields as they were sent."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def receive_upload(request: Request, upload: Upload, *, max_bytes: int) -> UploadForm:
    """Write the part ``file`` of a multipart body into ``upload``, as it arrives.

    Raises:
        UnsupportedMediaTypeError: The body is no multipart form.
        TooLargeError: The file has more than ``max_bytes`` bytes.
        RequestRefusedError: The body is broken, or a part is missing, unknown or given twice. It is raised when all
            of the body was received: a client that still sends would not hear the answer.
        StorageFullError: No room on the disk.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        shown = kind.decode("latin-1")[:80]
        message = f"content-type: {shown!r} is not read here; allowed: multipart/form-data with a boundary"
        raise UnsupportedMediaTypeError(message, param="content-type", code="unsupported_media_type")
    receiver = _Receiver(upload, max_bytes)
    try:
        parser = MultipartParser(boundary, receiver.callbacks())
    except FormParserError as error:
        raise RequestRefusedError(f"content-type: {error}", param="content-type", code="invalid_multipart") from None
    piece = bytearray()
    async for chunk in request.stream():
        piece += chunk
        if len(piece) >= _PIECE_BYTES:
            await run_in_threadpool(receiver.feed, parser, bytes(piece))
            piece.clear()
    await run_in_threadpool(receiver.feed, parser, bytes(piece))
    return receiver.finish()


class _Receiver:
    """Takes what the parser finds. The first problem is kept, and what comes after it is thrown away."""

    def __init__(self, upload: Upload, max_bytes: int) -> None:
        self._upload, self._max_bytes = upload, max_bytes
        self._form = UploadForm()
        self._problem: RequestRefusedError | None = None
        self._headers: dict[str, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._name = ""
        self._text = bytearray()
        self._parts = 0
        self._is_complete = False

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def feed(self, parser: MultipartParser, piece: bytes) -> None:
        """Parse a piece of the body."""
        if self._problem is not None or not piece:
            return
        try:
            parser.write(piece)
        except MultipartParseError as error:
            self._refuse(f"The body is no valid multipart form: {str(error)[:200]}", code="invalid_multipart")

    def finish(self) -> UploadForm:
        """What was received.

        Raises:
            RequestRefusedError: The first problem.
        """
        if self._problem is None and not self._is_complete:
            self._refuse("The body ends before its last part does.", code="invalid_multipart")
        if self._problem is None and self._form.filename is None:
            self._refuse("file: is required, as a part with a filename", code="invalid_file", param="file")
        if self._problem is not None:
            raise self._problem
        return self._form

    def _refuse(self, message: str, *, code: str, param: str | None = None) -> None:
        if self._problem is None:
            self._problem = RequestRefusedError(message, code=code, param=param)

    def _on_part_begin(self) -> None:
        self._headers.clear()
        self._text.clear()
        self._name = ""
        self._parts += 1
        if self._parts > _MAX_PARTS:
            self._refuse(f"The body has more than {_MAX_PARTS} parts.", code="invalid_multipart")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        if len(self._header_value) > _MAX_HEADER_BYTES:
            self._header_value.clear()
            self._refuse("A part has a header that is too long.", code="invalid_multipart")

    def _on_header_end(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        try:
            name, filename = options.get(b"name", b"").decode(), options.get(b"filename", b"").decode()
        except UnicodeDecodeError:
            self._refuse("A part has a name that is no UTF-8 text.", code="invalid_multipart")
            return
        shown = name[:80] if is_storable(name) else "?"
        self._name = name
        if not name:
            self._refuse("A part has no name.", code="invalid_multipart")
        elif name == "file":
            self._begin_file(filename, has_name=b"filename" in options)
        elif name not in _FIELDS:
            allowed = ", ".join(("file", *_FIELDS))
            self._refuse(f"{shown}: is not a known field; allowed: {allowed}", code="unknown_field", param=shown)
        elif b"filename" in options:
            self._refuse(f"{name}: must be text, got a file", code=f"invalid_{name}", param=name)
        elif name in self._form.fields:
            self._refuse(f"{name}: is given more than once", code=f"invalid_{name}", param=name)

    def _begin_file(self, filename: str, *, has_name: bool) -> None:
        filename = filename.replace("\\", "/").rpartition("/")[2]
        if self._form.filename is not None:
            self._refuse("file: is given more than once", code="invalid_file", param="file")
        elif not has_name:
            self._refuse("file: must be a file, got text", code="invalid_file", param="file")
        elif len(filename) > MAX_FILENAME or not filename.isprintable():
            message = f"file: its name must be at most {MAX_FILENAME} printable characters"
            self._refuse(message, code="invalid_file", param="file")
        else:
            self._form.filename = filename or "upload"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._problem is not None:
            return
        if self._name == "file":
            if self._upload.writer.size_bytes + end - start > self._max_bytes:
                message = f"file: has more than the {self._max_bytes} bytes allowed"
                raise TooLargeError(message, code="file_too_large", param="file")
            self._upload.writer.write(data[start:end])
        elif len(self._text) + end - start > _MAX_FIELD_BYTES:
            message = f"{self._name}: has more than {_MAX_FIELD_BYTES} bytes"
            self._refuse(message, code=f"invalid_{self._name}", param=self._name)
        else:
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._problem is not None or self._name == "file":
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            self._refuse(f"{self._name}: must be UTF-8 text", code=f"invalid_{self._name}", param=self._name)
            return
        self._form.fields[self._name] = text

    def _on_end(self) -> None:
        self._is_complete = True
