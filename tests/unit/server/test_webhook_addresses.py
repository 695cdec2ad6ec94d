"""Nothing is sent to a private address, however it is written and whatever DNS says (F32)."""

import asyncio
import socket
from typing import Any

import pytest

from server.webhooks.addresses import RefusedAddressError, check_url, is_public, resolve

PRIVATE = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "0", "0.0.0.0", "10.0.0.1",
    "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fc00::1]",
    "[fd12:3456::1]", "[fe80::1]", "[ff02::1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]",
    "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[2001:db8::1]", "localhost", "LOCALHOST", "localhost.", "a.localhost",
    "printer.local", "metadata.google.internal",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_private_addresses_are_refused_however_they_are_written(host: str, scheme: str) -> None:
    with pytest.raises(RefusedAddressError, match=r"private address|this machine"):
        check_url(f"{scheme}://{host}:8443/hook")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://user:secret@example.com/", "user name"),
        ("https://user@example.com/", "user name"),
        ("https://@example.com/", "user name"),
        ("https://[example.com]/", "valid URL|IPv6"),
        ("https://[::1/", "valid URL"),
        ("https://[1.2.3.4]/", "valid URL|IPv6"),
        ("https://[fe80::1%25eth0]/", "valid URL|IPv6"),
        ("ftp://example.com/", "begin with"),
        ("gopher://example.com/", "begin with"),
        ("file:///etc/passwd", "begin with"),
        ("//example.com/", "begin with"),
        ("example.com", "begin with"),
        ("https:///path", "name a host"),
        ("https://example.com:0/", "name a host"),
        ("https://example.com:99999/", "valid URL"),
        ("https://example.com:x/", "valid URL"),
        ("https://exa mple.com/", "visible"),
        ("https://example.com/\r\nhost: x", "visible"),
        ("https://ex\u00e4mple.com/", "ASCII"),
        ("https://example.com\\@127.0.0.1/", "user name|backslash"),
        ("https://example.com/\\x", "backslash"),
        ("https://example.com/#fragment", "fragment"),
        ("https://-.example.com/", "no name"),
        ("https://" + "a" * 64 + ".com/", "no name"),
        ("https://example.com/" + "a" * 2000, "at most"),
    ],
)
def test_other_refusals(url: str, why: str) -> None:
    with pytest.raises(RefusedAddressError, match=why):
        check_url(url)


def test_what_is_taken() -> None:
    target = check_url("https://Hooks.Example.com/a?b=c")
    assert (target.scheme, target.host, target.port, target.authority) == (
        "https", "hooks.example.com", 443, "hooks.example.com",
    )  # fmt: skip
    assert check_url("http://example.com:8080/").authority == "example.com:8080"
    assert check_url("https://[2606:4700::1111]/").authority == "[2606:4700::1111]"
    assert check_url("http://8.8.8.8/").host == "8.8.8.8"


def test_hosts_that_may_be_private() -> None:
    assert check_url("http://127.0.0.1:9/", private_hosts=["127.0.0.1"]).port == 9
    assert check_url("http://hooks.internal/", private_hosts=["Hooks.Internal"]).host == "hooks.internal"
    assert check_url("http://10.1.2.3/", private_hosts=["*"]).host == "10.1.2.3"
    with pytest.raises(RefusedAddressError):
        check_url("http://127.0.0.1/", private_hosts=["127.0.0.2"])
    with pytest.raises(RefusedAddressError):
        check_url("http://user@127.0.0.1/", private_hosts=["*"])


def test_every_address_of_a_name_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str] = []

    def look_up(host: str, port: int, *rest: Any, **options: Any) -> Any:
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    target = check_url("https://example.com/")
    answers[:] = ["93.184.216.34", "1.1.1.1", "1.1.1.1"]
    assert asyncio.run(resolve(target)) == ["93.184.216.34", "1.1.1.1"]
    answers[:] = ["93.184.216.34", "169.254.169.254"]
    with pytest.raises(RefusedAddressError, match="leads to a private address"):
        asyncio.run(resolve(target))
    assert asyncio.run(resolve(target, private_hosts=["example.com"])) == answers
    answers.clear()
    with pytest.raises(RefusedAddressError, match="cannot be resolved"):
        asyncio.run(resolve(target))


def test_translated_public_addresses_are_public() -> None:
    assert is_public("64:ff9b::808:808")
    assert is_public("::ffff:8.8.8.8")
    assert not is_public("fe80::1%eth0")
