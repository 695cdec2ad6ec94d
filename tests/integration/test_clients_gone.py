"""Clients that go away in the middle of something: the API keeps no descriptor, thread, file or job of theirs."""

import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from server.jobs.database import Database
from server.jobs.repository import Claim, FinishedWork, JobRepository
from server.storage import ArtifactStore

pytestmark = pytest.mark.integration

SIZE = 8 * 2**20  # more than all buffers between the two ends hold
TIMES = 25


class Api:
    """An API process without worker or broker, and hands on what it serves."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.data_dir = folder / "data"
        self.log = folder / "api.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
        variables = {
            "MEDSORA_DATA_DIR": str(self.data_dir),
            "MEDSORA_CHECKPOINTS": str(checkpoint),
            "MEDSORA_REDIS_URL": "redis://127.0.0.1:1/0",
            "MEDSORA_KEYS": "off",
            "MEDSORA_MIN_FREE_BYTES": "0",
            "MEDSORA_EVENTS_HEARTBEAT_S": "0.5",
        }
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "server.cli", "api", "--port", str(self.port)]
            root = Path(__file__).parents[2]
            self.process = subprocess.Popen(command, cwd=root, env={**clean, **variables}, stdout=log, stderr=log)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30.0)
        try:
            self.wait_until(self._is_up, "an answer")
        except BaseException:
            self.http.close()
            self.process.kill()
            self.process.wait()
            raise
        self.database = Database(f"sqlite:///{self.data_dir / 'medsora.db'}")
        self.repository = JobRepository(self.database, lease_s=600.0, max_attempts=3)
        self.store = ArtifactStore(self.data_dir / "artifacts")
        self.watched = psutil.Process(self.process.pid)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("/health/live").status_code == 200
        except httpx.TransportError:
            return False

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"never came: {what}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def held(self) -> int:
        """Open sockets and files, but for those of the database: it has a pool, and closes files when nobody locks."""
        names = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                names.append(str(link.readlink()))
            except FileNotFoundError:  # closed meanwhile
                continue
        return sum("/medsora.db" not in name for name in names)

    def begin(self) -> Claim:
        """A job that we are at work on."""
        made = self.http.post("/v1/videos", json={"prompt": "covid lung"})
        claim = self.repository.claim(made.json()["id"], worker="test")
        assert claim is not None
        return claim

    def finish(self, claim: Claim, content: bytes) -> Path:
        """Publish bytes as its video."""
        stored = self.store.write(
            claim.job.id, claim.token, lambda path: path.write_bytes(content) and None, lambda path: None
        )
        times = {"sampling_s": 1.0, "encode_s": 0.0, "store_s": 0.0}
        work = FinishedWork(artifact=stored.name, size_bytes=len(content), sha256=stored.sha256, **times)
        assert self.repository.succeed(claim.job.id, claim.token, work)
        return self.store.path(stored.name)

    def connect(self, request: bytes) -> socket.socket:
        """A connection with a small window, on which this was sent."""
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        made.settimeout(30.0)
        made.connect(("127.0.0.1", self.port))
        made.sendall(request)
        return made

    def close(self) -> None:
        self.http.close()
        self.database.close()
        self.process.terminate()
        assert self.process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Api]:
    made = Api(tmp_path_factory.mktemp("gone"), tiny_checkpoint)
    yield made
    made.close()


@contextmanager
def nothing_is_kept(api: Api) -> Iterator[None]:
    """Descriptors and threads come down to what they were, but for pools; memory but for what allocators keep."""
    held, threads = api.held(), api.watched.num_threads()
    memory = api.watched.memory_info().rss
    yield
    api.wait_until(lambda: api.held() <= held, f"no more than {held} sockets and files")
    # the pool of worker threads may still grow to its 40
    assert api.watched.num_threads() <= threads + 40
    assert api.watched.memory_info().rss < memory + 64 * 2**20
    assert api.http.get("/health/live").status_code == 200


def leave(connection: socket.socket, *, rudely: bool) -> None:
    """Go away, with a RST or with a FIN."""
    if rudely:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


def read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(4096)
        assert piece, head
        head += piece
    return head


def leave_in_the_middle(api: Api, target: str) -> None:
    """Begin to download, and go away, again and again."""
    for number in range(TIMES):
        connection = api.connect(get(target))
        assert read_head(connection).startswith(b"HTTP/1.1 200")
        connection.recv(64 * 1024, socket.MSG_WAITALL)
        leave(connection, rudely=number % 2 == 0)


def test_in_the_middle_of_a_download(api: Api) -> None:
    content = os.urandom(SIZE)
    claim = api.begin()
    path = api.finish(claim, content)
    target = f"/v1/videos/{claim.job.id}/content"
    assert api.http.get(target).content == content
    with nothing_is_kept(api):
        leave_in_the_middle(api, target)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()
    assert api.http.get(target).content == content


@pytest.mark.parametrize("of_all", [False, True])
def test_while_following_events(api: Api, of_all: bool) -> None:
    claim = api.begin()
    target = "/v1/events" if of_all else f"/v1/videos/{claim.job.id}/events"
    with nothing_is_kept(api):
        connections = [api.connect(get(target)) for _ in range(TIMES)]
        for number, connection in enumerate(connections):
            assert b"text/event-stream" in read_head(connection)
            leave(connection, rudely=number % 2 == 0)
    assert api.repository.fail(claim.job.id, claim.token, code="internal_error", message="m")


def test_while_watching_a_video_that_is_being_made(api: Api) -> None:
    claim = api.begin()
    live = api.store.live_path(claim.job.id, claim.token)
    live.parent.mkdir(parents=True, exist_ok=True)
    live.write_bytes(os.urandom(SIZE))
    target = f"/v1/videos/{claim.job.id}/stream"
    with nothing_is_kept(api):
        leave_in_the_middle(api, target)
        waiting = api.begin()  # nothing to see yet: these hear nothing at all before they go
        unanswered = [api.connect(get(f"/v1/videos/{waiting.job.id}/stream")) for _ in range(TIMES)]
        for number, connection in enumerate(unanswered):
            leave(connection, rudely=number % 2 == 0)
    assert live.stat().st_size == SIZE, "what is being made is not touched"
    for one in (claim, waiting):
        assert api.repository.fail(one.job.id, one.token, code="internal_error", message="m")


@pytest.mark.parametrize("path", ["/v1/files", "/v1/videos"])
def test_in_the_middle_of_an_upload(api: Api, path: str) -> None:
    def files() -> list[str]:
        return sorted(str(one) for one in api.data_dir.rglob("*") if one.is_file() and "medsora.db" not in one.name)

    field = "file" if path == "/v1/files" else "input_reference"
    about = "".join(
        f'--edge\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("purpose", "batch"), ("prompt", "covid lung"))
        if (name == "purpose") == (path == "/v1/files")
    )
    part = f'--edge\r\ncontent-disposition: form-data; name="{field}"; filename="a.png"\r\n\r\n'
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=edge\r\n"
        f"content-length: {2 * SIZE}\r\nexpect: 100-continue\r\n\r\n"
    ).encode()
    jobs, before = api.repository.count_live(), files()
    with nothing_is_kept(api):
        for number in range(TIMES):
            connection = api.connect(head)
            # whoever leaves before it is read from leaves nothing behind anyway
            assert read_head(connection).startswith(b"HTTP/1.1 100")
            connection.sendall(f"{about}{part}".encode() + b"x" * 2**18)
            leave(connection, rudely=number % 2 == 0)
        ended = f"method=POST route={path} status=499"
        api.wait_until(lambda: api.log.read_text().count(ended) == TIMES, f"the end of {TIMES} uploads")
    api.wait_until(lambda: files() == before, "no file of what was not sent whole")
    assert api.repository.count_live() == jobs


def test_requests_that_never_end_hold_up_nobody(api: Api) -> None:
    """Slow readers and senders cost a connection each, and no thread: others are answered at once."""
    content = os.urandom(SIZE)
    claim = api.begin()
    api.finish(claim, content)
    slow = [api.connect(get(f"/v1/videos/{claim.job.id}/content")) for _ in range(60)]
    slow += [api.connect(b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n") for _ in range(60)]
    found: list[int] = []
    try:
        thread = threading.Thread(target=lambda: found.append(api.http.get("/v1/videos").status_code))
        thread.start()
        thread.join(15)
        assert found == [200]
    finally:
        for connection in slow:
            leave(connection, rudely=True)
    assert re.search(r"req_[0-9a-f]+", api.http.get("/health/live").headers["x-request-id"])
