"""Who asks, and what they may do. Every route under /v1 passes through :func:`get_caller`.

What a route needs is read off its path, in one table: a route that the table does not know is open to no key.
"""

import ipaddress
import math
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Scope as Connection

from server import logs
from server.errors import ForbiddenError, OverloadedError, UnauthorizedError
from server.jobs.model import DEFAULT_TENANT
from server.keys.limits import RequestLimiter, RequestRate
from server.keys.model import ALL_SCOPES, Scope
from server.keys.repository import KeyRepository, KeyState
from server.observability import RATE_HEADERS
from server.settings import Settings

__all__ = ["NEEDS", "AccessControl", "Caller", "CallerDep", "TenantDep", "get_caller", "is_loopback"]

NEEDS: dict[str, tuple[Scope | None, Scope | None]] = {
    "videos": (Scope.VIDEOS_READ, Scope.VIDEOS_WRITE),
    "events": (Scope.VIDEOS_READ, Scope.VIDEOS_READ),
    "files": (Scope.BATCHES, Scope.BATCHES),
    "batches": (Scope.BATCHES, Scope.BATCHES),
    "datasets": (Scope.DATASETS, Scope.DATASETS),
    "webhooks": (Scope.WEBHOOKS, Scope.WEBHOOKS),
    "models": (None, None),
    "usage": (None, None),
}
"""First part of a path under /v1 -> what reading needs, and what everything else needs; None: any key will do."""

_READING = frozenset({"GET", "HEAD"})
_HOW = "Send a key as `Authorization: Bearer medsora_...`; `medsora-server keys create` makes one."


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    tenant: str
    """Whose objects they see, and whose those are that they make."""
    key_id: str | None
    """Their key; None: none was needed."""
    scopes: frozenset[Scope]
    """What they may do."""


NOBODY_ELSE = Caller(tenant=DEFAULT_TENANT, key_id=None, scopes=ALL_SCOPES)
"""Who asks where no key is needed: the one tenant, who may do everything."""


class AccessControl:
    """Tells callers by their keys, and counts what they ask.

    Args:
        limiter: Of the requests of each tenant.
        settings: Whether keys are needed, and where the API listens.
    """

    def __init__(self, keys: KeyRepository, limiter: RequestLimiter, settings: Settings) -> None:
        self._keys = keys
        self._limiter = limiter
        self._policy = settings.keys
        self._is_local = is_loopback(settings.host)

    def needs_key(self) -> bool:
        """Whether callers must have a key now."""
        if self._policy == "auto":
            return not self._is_local or self._keys.any_exists()
        return self._policy == "required"

    def admit(self, scope: Connection) -> Caller:
        """Who asks, if they may do what they ask for. However often this is called for a request, it counts once.

        Raises:
            UnauthorizedError: A key is needed, and there is none that is good.
            ForbiddenError: The key is not good for this.
            OverloadedError: The tenant has made too many requests.
        """
        headers = Headers(scope=scope)
        caller = self.identify(headers)
        logs.note(tenant=caller.tenant)
        check_scope(caller, scope["method"], scope["path"])
        if not scope.get(RATE_HEADERS):
            self._count(caller, scope)
        return caller

    def _count(self, caller: Caller, scope: Connection) -> None:
        rate = self._limiter.take(caller.tenant)
        if rate is None:
            return
        scope.setdefault(RATE_HEADERS, []).extend(_rate_headers(rate))
        if rate.retry_after_s > 0:
            message = f"This tenant may make {rate.limit} requests a minute, and has. Try again later."
            retry_after_ms = math.ceil(rate.retry_after_s * 1000)
            raise OverloadedError(message, code="rate_limit_exceeded", retry_after_ms=retry_after_ms)

    def identify(self, headers: Headers) -> Caller:
        """Who asks.

        Raises:
            UnauthorizedError: A key is needed, and there is none, or it is not good (any more).
        """
        if not self.needs_key():
            if self._policy == "auto":
                _check_local(headers)
            return NOBODY_ELSE  # OpenAI's client always sends some key
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise UnauthorizedError(f"A key is needed here. {_HOW}", code="missing_api_key")
        key = self._keys.find(text.strip())
        if key is None:
            raise UnauthorizedError(f"The key is not known here. {_HOW}", code="invalid_api_key")
        if key.state is not KeyState.ACTIVE:  # only who has the whole key hears of it
            raise UnauthorizedError(f"The key {key.id} is {key.state.value}. {_HOW}", code="invalid_api_key")
        return Caller(tenant=key.tenant, key_id=key.id, scopes=key.scopes)


def _check_local(headers: Headers) -> None:
    """Refuse what a page of another site asks for in a browser of this machine: it can post forms to loopback, and let
    a name of its own lead there (DNS rebinding).

    Raises:
        UnauthorizedError: The page, or the name by which the server was called, is not of this machine.
    """
    host = headers.get("host", "localhost")
    named = [("Pages of", headers["origin"])] if "origin" in headers else []
    for what, address in (*named, ("Requests to", f"//{host}")):
        if not is_loopback(_hostname(address)):
            shown = address.removeprefix("//")[:80]
            raise UnauthorizedError(f"{what} {shown!r} need a key here. {_HOW}", code="missing_api_key")


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # brackets without an address
        return ""


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _rate_headers(rate: RequestRate) -> list[tuple[bytes, bytes]]:
    """As the drafts of the IETF have it, and as OpenAI's clients read it."""
    reset_s = math.ceil(rate.reset_s)
    values = {
        "ratelimit-policy": f"{rate.limit};w=60",
        "ratelimit-limit": str(rate.limit),
        "ratelimit-remaining": str(rate.remaining),
        "ratelimit-reset": str(reset_s),
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.remaining),
        "x-ratelimit-reset-requests": f"{reset_s}s",
    }
    return [(name.encode(), value.encode()) for name, value in values.items()]


def check_scope(caller: Caller, method: str, path: str) -> None:
    """Refuse what the caller's key is not good for.

    Raises:
        ForbiddenError: Names the scope that is missing.
    """
    if caller.scopes == ALL_SCOPES:
        return
    resource = path.removeprefix("/v1/").partition("/")[0]
    needs = NEEDS.get(resource)
    if needs is None:
        message = f"The key {caller.key_id} is not good for {path[:80]}: that needs a key with all scopes."
        raise ForbiddenError(message, code="insufficient_scope")
    needed = needs[method not in _READING]
    if needed is not None and needed not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        message = (
            f"The key {caller.key_id} lacks the scope {needed.value}, which {method} {path[:80]} needs; it has: {has}"
        )
        raise ForbiddenError(message, code="insufficient_scope")


_bearer = HTTPBearer(auto_error=False, description="A key of `medsora-server keys create`; not needed on loopback.")


def get_caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> Caller:
    """Who asks, if they may do what they ask for.

    Raises:
        UnauthorizedError: A key is needed, and there is none that is good.
        ForbiddenError: The key is not good for this.
        OverloadedError: The tenant has made too many requests.
    """
    access: AccessControl = request.app.state.services.access
    return access.admit(request.scope)


CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_tenant(caller: CallerDep) -> str:
    """Whose objects the caller sees."""
    return caller.tenant


TenantDep = Annotated[str, Depends(get_tenant)]
