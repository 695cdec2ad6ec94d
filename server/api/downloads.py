"""Answers that are an object of a store: from the disk, through this process from a bucket, or by a link to there."""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse

from server.api.ranges import check_range, describe_part, part_of
from server.objects import LocalObjects, Objects

__all__ = ["PIECE_BYTES", "is_known", "send_object"]

PIECE_BYTES = 256 * 1024
"""In which files are sent."""
_NO_LINKS = ("x-medsora-links", "none")
"""Header of a request whose sender cannot go where links lead: the playground may reach this server alone."""


def send_object(
    request: Request,
    objects: Objects,
    key: str,
    *,
    etag: str,
    media_type: str,
    filename: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An object, whole or the range of bytes that is asked for; or 304, where the client has it.

    Args:
        etag: With its quotes.
        filename: Of the download; None: it is shown rather than saved.
        headers: Further ones.

    Raises:
        FileNotFoundError: It is not there.
        RangeError: The bytes that are asked for do not exist.
        StorageUnavailableError: The bucket cannot be read.
    """
    all_headers = {"etag": etag, "cache-control": "private, no-cache", **(headers or {})}
    if isinstance(objects, LocalObjects):
        path = objects.path(key)
        stat = path.stat()
        if is_known(request, etag):
            return Response(status_code=304, headers=all_headers)
        check_range(request, stat.st_size)
        return FileResponse(path, stat_result=stat, media_type=media_type, filename=filename, headers=all_headers)
    size = objects.size(key)
    if is_known(request, etag):
        return Response(status_code=304, headers=all_headers)
    disposition = None if filename is None else _attachment(filename)
    name, value = _NO_LINKS
    if request.method == "GET" and request.headers.get(name) != value:  # a link is signed for one method
        link = objects.link(key, disposition=disposition, media_type=media_type)
        if link is not None:
            return RedirectResponse(link, status_code=307, headers={"cache-control": "private, no-store"})
    check_range(request, size)
    begin, end = part_of(request, size, etag)
    status, of_part = describe_part(begin, end, size)
    all_headers |= of_part
    if disposition is not None:
        all_headers["content-disposition"] = disposition
    if request.method == "HEAD":
        return Response(status_code=status, headers=all_headers, media_type=media_type)
    pieces = _pieces(objects, key, begin, end)
    return StreamingResponse(pieces, status_code=status, headers=all_headers, media_type=media_type)


def is_known(request: Request, etag: str) -> bool:
    """Whether the client says that it has what this tag (with its quotes) stands for."""
    tags = request.headers.get("if-none-match", "").split(",")
    return etag in [tag.strip().removeprefix("W/") for tag in tags]


def _pieces(objects: Objects, key: str, begin: int, end: int) -> Iterator[bytes]:
    with objects.open(key) as file:
        file.seek(begin)
        left = end - begin
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise OSError(f"{key} is shorter than it was")
            left -= len(piece)
            yield piece


def _attachment(filename: str) -> str:
    """Content-Disposition with a name that every client reads safely (RFC 6266)."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
