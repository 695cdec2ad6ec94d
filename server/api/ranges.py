"""Downloads of a part of a file."""

import re

from fastapi import Request

from server.errors import RangeError

__all__ = ["check_range", "describe_part", "part_of"]

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.ASCII | re.IGNORECASE)


def check_range(request: Request, size: int) -> None:
    """Leave one satisfiable range to ``FileResponse``, refuse one that is not, and overlook all else.

    A server may overlook any Range header; several ranges at once have only ever been used to attack.

    Raises:
        RangeError: The bytes that are asked for do not exist.
    """
    text = request.headers.get("range")
    if text is None:
        return
    unit, _, spec = text.partition("=")
    first, dash, last = (part.strip() for part in spec.partition("-"))
    numbers = [part for part in (first, last) if part]
    is_usable = (
        unit.strip().lower() == "bytes"
        and dash == "-"
        and bool(numbers)
        and all(part.isascii() and part.isdigit() and len(part) < 19 for part in numbers)
        and not (first and last and int(first) > int(last))
    )
    # the last bytes of an empty file: all of it, which no Content-Range can say
    if not is_usable or (size == 0 and not first and int(last) > 0):
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif (first and int(first) >= size) or (not first and int(last) == 0):
        raise RangeError(
            f"range: {text[:80]!r} lies outside of the file, which has {size} bytes.",
            param="range",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}"},
        )


def part_of(request: Request, size: int, etag: str) -> tuple[int, int]:
    """The bytes that are asked for, from the first up to but not the second; after :func:`check_range`."""
    match = _RANGE.fullmatch(dict(request.scope["headers"]).get(b"range", b"").decode("latin-1"))
    if match is None or request.headers.get("if-range", etag) != etag:
        return 0, size
    first, last = match[1], match[2]
    return int(first) if first else max(0, size - int(last)), min(int(last) + 1, size) if first and last else size


def describe_part(begin: int, end: int, size: int) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer that holds these bytes of so many: 206 unless they are all."""
    headers = {"accept-ranges": "bytes", "content-length": str(end - begin)}
    if end - begin == size:
        return 200, headers
    return 206, {**headers, "content-range": f"bytes {begin}-{end - 1}/{size}"}
