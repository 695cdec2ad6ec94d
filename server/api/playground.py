"""/, /docs and /playground: a page for browsers, made of files that lie in the package and are served as they are.

They need no key: what they show they ask of /v1 with the key of whoever looks. The policy sent with them lets a browser
run and load what this server sends, and nothing else.
"""

import hashlib
import mimetypes
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from server.api.downloads import is_known
from server.errors import NotFoundError

__all__ = ["POLICY", "make_router"]

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",  # data: pictures of the running estimate
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}


@dataclass(frozen=True)
class _Page:
    content: bytes
    media_type: str
    etag: str


def make_router() -> APIRouter:
    """Routes of the playground. Its files are read once; what is not among them is not found."""
    router = APIRouter(include_in_schema=False)
    pages = dict(_read(files("server") / "playground"))

    def answer(name: str, request: Request) -> Response:
        page = pages.get(name)
        if page is None:
            raise NotFoundError(f"There is no {request.url.path[:80]!r} here.", code="not_found")
        headers = {**_HEADERS, "etag": page.etag}
        if is_known(request, page.etag):
            return Response(status_code=304, headers=headers)
        return Response(page.content, media_type=page.media_type, headers=headers)

    @router.head("/")
    @router.get("/")
    def get_playground(request: Request) -> Response:
        """The page."""
        return answer("index.html", request)

    @router.head("/docs")
    @router.get("/docs")
    def get_reference() -> Response:
        """The part of the page where every endpoint is described, and can be tried."""
        return RedirectResponse("/#/reference", headers=_HEADERS)

    @router.head("/playground/{name:path}")
    @router.get("/playground/{name:path}")
    def get_playground_file(name: str, request: Request) -> Response:
        """What the page is made of."""
        return answer(name, request)

    return router


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, _Page]]:
    found = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += _read(entry, f"{name}/")
            continue
        content = entry.read_bytes()
        suffix = "." + entry.name.rpartition(".")[2]
        media_type = _TYPES.get(suffix) or mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
        found.append((name, _Page(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')))
    return found
