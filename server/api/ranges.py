"""Downloads of a part of a file."""

from fastapi import Request

from server.errors import RangeError

__all__ = ["check_range"]


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
    if not is_usable:
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif (first and int(first) >= size) or (not first and int(last) == 0):
        raise RangeError(
            f"range: {text[:80]!r} lies outside of the file, which has {size} bytes.",
            param="range",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}"},
        )
