"""The proxy's own configuration in nginx, without a container: it is accepted, and lets through what it should.

Paths and ports of the container are replaced by free ones; all else is as it is shipped.
"""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import Authority
from ports import free_ports
from waiting import wait_until

ROOT = Path(__file__).parents[2]
PROXY = ROOT / "docker" / "proxy"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: nginx-light)"),
]


class Api(BaseHTTPRequestHandler):
    """Tells what reaches it."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        told = {
            "path": self.path,
            "bytes": len(self.rfile.read(length)),
            "host": self.headers["host"],
            "proto": self.headers["x-forwarded-proto"],
            "for": self.headers["x-forwarded-for"],
        }
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-request-id", "req_1")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer  # noqa: N815 - the names that it is called by

    def log_request(self, *args: Any) -> None:
        """Nobody reads it."""


class Proxy:
    """nginx with the shipped configuration, filled in as start.sh does it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        threading.Thread(target=self.api.serve_forever, daemon=True).start()
        self.http_port, self.https_port, self.watch_port, live_port = free_ports(4)
        authority = Authority()
        issued = authority.issue("localhost")
        for name in ("secrets", "spool", "tmp"):
            (folder / name).mkdir()
        (folder / "secrets" / "tls_certificate").write_bytes(issued.certificate)
        (folder / "secrets" / "tls_key").write_bytes(issued.key)
        self.context = ssl.create_default_context(cadata=authority.certificate.decode())
        filled = {
            " /tmp/": f" {folder}/tmp/",
            "@RESOLVER@": "127.0.0.1",
            "@API@": f"127.0.0.1:{self.api.server_port}",
            "@MAX_BODY@": "26m",
            "@MAX_FILE@": "201m",
            "@CONNECTIONS@": "20",
            "/run/secrets/": f"{folder}/secrets/",
            "/var/spool/proxy/": f"{folder}/spool/",
            "/dev/stdout": f"{folder}/access.log",
            "listen 8080 ": f"listen 127.0.0.1:{self.http_port} ",
            "listen 8443 ": f"listen 127.0.0.1:{self.https_port} ",
            "listen 9443 ": f"listen 127.0.0.1:{self.watch_port} ",
            "listen 127.0.0.1:8081": f"listen 127.0.0.1:{live_port}",
        }
        for name in ("nginx.conf", "api.conf"):
            text = (PROXY / name).read_text()
            for old, new in filled.items():
                text = text.replace(old, new)
            assert not re.search("@[A-Z]+@", text.replace("@NAMES@", ""))
            (folder / "tmp" / name).write_text(text)
        user = "user root; " if os.geteuid() == 0 else ""
        assert NGINX is not None
        command = [NGINX, "-e", "/dev/stderr", "-c", str(folder / "tmp" / "nginx.conf"), "-g", f"{user}daemon off;"]
        with (folder / "nginx.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.http = httpx.Client(base_url=f"https://localhost:{self.https_port}", verify=self.context, timeout=30)
        wait_until(self._is_up, timeout_s=10, what=lambda: (folder / "nginx.log").read_text())

    def _is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder / "nginx.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.https_port), timeout=5).close()
        except ConnectionRefusedError:
            return False
        return True

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(10)
        self.api.shutdown()
        self.api.server_close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    made = Proxy(tmp_path_factory.mktemp("proxy"))
    yield made
    made.close()


def test_requests_reach_the_api_with_what_it_asks_for(proxy: Proxy) -> None:
    answer = proxy.http.post("/v1/videos?limit=2", content=b"x" * 1000)
    assert answer.json() == {
        "path": "/v1/videos?limit=2",
        "bytes": 1000,
        "host": f"localhost:{proxy.https_port}",
        "proto": "https",
        "for": "127.0.0.1",
    }
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


def test_plain_http_is_sent_to_https(proxy: Proxy) -> None:
    answer = httpx.get(f"http://localhost:{proxy.http_port}/v1/videos?limit=2")
    assert (answer.status_code, answer.headers["location"]) == (308, "https://localhost/v1/videos?limit=2")


@pytest.mark.parametrize(("path", "mebibytes", "status"), [("/v1/videos", 27, 413), ("/v1/files", 27, 200)])
def test_bodies_have_limits(proxy: Proxy, path: str, mebibytes: int, status: int) -> None:
    assert proxy.http.post(path, content=b" " * (mebibytes * 2**20)).status_code == status


def test_figures_stay_within(proxy: Proxy) -> None:
    assert proxy.http.get("/metrics").status_code == 404


def test_old_protocols_are_refused(proxy: Proxy) -> None:
    told = subprocess.run(
        ["openssl", "s_client", "-connect", f"localhost:{proxy.https_port}", "-tls1_1"],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode != 0


def test_a_head_that_does_not_end_is_cut_off(proxy: Proxy) -> None:
    raw = socket.create_connection(("localhost", proxy.https_port), timeout=40)
    with proxy.context.wrap_socket(raw, server_hostname="localhost") as slow:
        began = time.monotonic()
        slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
        end = b"anything"
        try:
            while end:
                end = slow.recv(4096)
        except ConnectionResetError:
            pass
        assert 5 < time.monotonic() - began < 20


def test_one_address_has_so_many_connections(proxy: Proxy) -> None:
    """Requests that are under way count."""
    held = []
    try:
        for _ in range(20):
            raw = socket.create_connection(("localhost", proxy.https_port), timeout=40)
            held.append(proxy.context.wrap_socket(raw, server_hostname="localhost"))
            held[-1].sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")

        def is_refused() -> bool:
            return proxy.http.get("/health/live").status_code == 429

        wait_until(is_refused, timeout_s=5, what="a refusal")
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: proxy.http.get("/health/live").status_code == 200, timeout_s=5, what="room for one more")


def test_the_log_has_paths_and_nothing_of_the_callers(proxy: Proxy) -> None:
    proxy.http.get("/v1/models?key=secret", headers={"authorization": "Bearer secret"})
    lines = wait_until(
        lambda: [line for line in proxy.logged() if line["path"] == "/v1/models"], timeout_s=5, what="a line"
    )
    assert {"part": "proxy", "method": "GET", "status": 200, "request_id": "req_1"}.items() <= lines[0].items()
    assert "secret" not in (proxy.folder / "access.log").read_text()
