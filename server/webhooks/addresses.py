"""Where a server may be asked to send something: never to itself or to what only it can reach.

A name is resolved once, every address that comes of it is checked, and the connection goes to one of those that were
checked; whoever answers a second question of DNS differently gains nothing.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["RefusedAddressError", "Target", "check_url", "is_public", "resolve"]

MAX_URL = 2000
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_ANYBODY = "*"


class RefusedAddressError(ValueError):
    """Nothing is sent there; the message says why, without the address."""


@dataclass(frozen=True)
class Target:
    """A checked URL in its parts."""

    scheme: str
    host: str
    """A name, or an address without brackets."""
    port: int

    @property
    def authority(self) -> str:
        """As the header ``Host`` says it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_usual = self.port == {"http": 80, "https": 443}[self.scheme]
        return host if is_usual else f"{host}:{self.port}"


def check_url(url: str, *, private_hosts: Collection[str] = ()) -> Target:
    """Check what can be checked without asking DNS.

    Args:
        private_hosts: Hosts that may be private; ``*``: all.

    Raises:
        RefusedAddressError: No http(s) URL of a plain host; one with a name and password; or a private address.
    """
    if len(url) > MAX_URL or not url.isascii() or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise RefusedAddressError(f"must be at most {MAX_URL} visible ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise RefusedAddressError("is no valid URL") from None
    if parts.scheme not in ("http", "https"):
        raise RefusedAddressError("must begin with https:// or http://")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise RefusedAddressError("must have no user name or password")
    if parts.fragment or "#" in url:
        raise RefusedAddressError("must have no fragment")
    if "\\" in url:
        raise RefusedAddressError("must have no backslash")
    if not host or (port is not None and port == 0):
        raise RefusedAddressError("must name a host")
    is_literal = "[" in parts.netloc
    if is_literal:
        try:
            if "%" in host:  # of one link: it means nothing elsewhere
                raise ValueError
            ipaddress.IPv6Address(host)
        except ValueError:
            raise RefusedAddressError("has something in brackets that is no IPv6 address") from None
    elif _NAME.fullmatch(host) is None:
        raise RefusedAddressError("has a host that is no name or address")
    target = Target(parts.scheme, host.rstrip("."), port or {"http": 80, "https": 443}[parts.scheme])
    if not _may_be_private(target.host, private_hosts):
        if target.host.lower() == "localhost" or target.host.lower().endswith((".localhost", ".local", ".internal")):
            raise RefusedAddressError("names a host of this machine or network")
        try:
            # All the ways of writing an address that the system knows, such as 127.1 or 0x7f000001.
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            found = []  # a name
        if not all(is_public(str(entry[4][0])) for entry in found):
            raise RefusedAddressError("is a private address")
    return target


async def resolve(target: Target, *, private_hosts: Collection[str] = ()) -> list[str]:
    """Addresses of a host, all of them public.

    Raises:
        RefusedAddressError: One is private, or there is none.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RefusedAddressError("the name cannot be resolved") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses:
        raise RefusedAddressError("the name cannot be resolved")
    if not _may_be_private(target.host, private_hosts) and not all(map(is_public, addresses)):
        raise RefusedAddressError("the name leads to a private address")
    return addresses


def is_public(text: str) -> bool:
    """Whether an address is reached the same from everywhere: nothing private, local, shared, reserved or translated.

    >>> is_public("8.8.8.8"), is_public("169.254.169.254"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # with a zone, most often: of a link
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if address.sixtofour is not None or address.teredo is not None:
            return False
        if any(address in network for network in _NAT64):
            return address in _NAT64[0] and is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
    return address.is_global and not address.is_multicast and not address.is_reserved


def _may_be_private(host: str, private_hosts: Collection[str]) -> bool:
    return _ANYBODY in private_hosts or host.lower() in {one.lower() for one in private_hosts}
