"""Server-sent events from real processes: live, through a second API process, with clients that leave."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet]


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Events as they come; heartbeats are passed on as ``{}``."""
    fields: dict[str, Any] = {}
    for line in answer.iter_lines():
        if line.startswith(":"):
            yield {}
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = json.loads(value) if name == "data" else value
        else:
            if "data" in fields:
                yield fields
            fields = {}


def follow(base_url: str, path: str, **options: Any) -> list[dict[str, Any]]:
    """All events of a stream until it ends."""
    with httpx.Client(base_url=base_url, timeout=60) as client, client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, answer.read()
        return [event for event in events_of(answer) if event]


@pytest.fixture
def second_api(server: "RunningServer") -> Iterator[str]:
    """Another API process on the same data; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    socket_path = server.data_dir / "run" / "redis.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "api", "--port", str(port)],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            **server.variables,
            "MEDSORA_DATA_DIR": str(server.data_dir),
            "MEDSORA_REDIS_URL": f"redis+socket://{socket_path}",
            "MEDSORA_KEYS": "off",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:

        def is_up() -> bool:
            try:
                return httpx.get(f"{address}/health/live").status_code == 200
            except httpx.TransportError:
                return False

        server.wait_until(is_up, timeout_s=30, what="the second API process")
        yield address
    finally:
        process.terminate()
        assert process.wait(15) in (0, -15)


def test_a_job_from_queue_to_end_in_two_processes(server: "RunningServer", second_api: str) -> None:
    blocker = server.submit(steps=300)
    job_id = server.submit(steps=301)  # not to be sampled together with the other
    heard: dict[str, list[dict[str, Any]]] = {}

    def listen(name: str, base_url: str, path: str) -> None:
        heard[name] = follow(base_url, path)

    first = str(server.http.base_url)
    threads = [
        threading.Thread(target=listen, args=("first", first, f"/v1/videos/{job_id}/events")),
        threading.Thread(target=listen, args=("second", second_api, f"/v1/videos/{job_id}/events?preview=true")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert server.job(blocker).completed_at is not None
    for events in heard.values():
        kinds = [event["event"] for event in events]
        assert (kinds[0], kinds[-1]) == ("video.queued", "video.completed")
        assert kinds.count("video.started") == 1
        assert kinds.count("video.progress") >= 2
        steps = [event["data"]["data"]["steps_done"] for event in events if event["event"] == "video.progress"]
        assert steps == sorted(steps)
        places = [event["data"]["data"].get("queue_position") for event in events if event["event"] == "video.queued"]
        # The worker may not have taken the blocker yet when the first place is told.
        assert places in ([None, 1], [None, 2, 1])
        seqs = [int(event["id"]) for event in events if "id" in event]
        assert seqs == sorted(set(seqs))
    assert not [event for event in heard["first"] if event["event"] == "video.preview"]
    previews = [event["data"]["data"] for event in heard["second"] if event["event"] == "video.preview"]
    assert previews
    picture = Image.open(io.BytesIO(base64.b64decode(previews[0]["image"].removeprefix("data:image/webp;base64,"))))
    assert (picture.format, picture.size) == ("WEBP", (32, 32))
    assert "Synthetic" in picture.getexif()[0x010E]


def test_all_jobs_and_coming_back(server: "RunningServer") -> None:
    with server.http.stream("GET", "/v1/events") as answer:
        events = events_of(answer)
        ids = [server.submit(seed=seed) for seed in range(3)]
        heard: list[dict[str, Any]] = []
        while len([event for event in heard if event["event"] == "video.completed"]) < 3:
            event = next(events)
            if event:  # no heartbeat
                heard.append(event)
    states = [event for event in heard if "id" in event and event["event"] != "video.progress"]
    assert {event["data"]["data"]["id"] for event in states} == set(ids)
    assert len(states) >= 9  # queued, started and completed of each
    # Whoever comes back hears the rest, and nothing twice.
    with server.http.stream("GET", "/v1/events", headers={"last-event-id": states[3]["id"]}) as answer:
        events = events_of(answer)
        assert [next(events) for _ in states[4:]] == states[4:]


def test_many_idle_listeners_are_cheap_and_leave_nothing(start_server: "StartServer") -> None:
    server = start_server(MEDSORA_EVENTS_HEARTBEAT_S="1")
    api = server.child("api")
    server.http.get("/health/ready")
    port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
    files_before, cpu_before, began = api.num_fds(), None, 0.0
    sockets = []
    try:
        for _ in range(1000):
            one = socket.create_connection(("127.0.0.1", port), timeout=30)
            one.sendall(b"GET /v1/events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            sockets.append(one)
        for one in sockets:
            assert one.recv(4096).startswith(b"HTTP/1.1 200")
        assert api.num_fds() >= files_before + 1000
        cpu_before, began = api.cpu_times(), time.monotonic()
        time.sleep(3)
        cpu = api.cpu_times()
        used = cpu.user + cpu.system - cpu_before.user - cpu_before.system
        share = used / (time.monotonic() - began)
        assert share < 0.5, f"1000 idle listeners take {share:.0%} of a core"
        began = time.monotonic()
        assert server.http.get("/v1/videos").status_code == 200
        assert time.monotonic() - began < 1.0
        job_id = server.submit()
        for one in sockets[::100]:
            received = b""
            while f'"id":"{job_id}","status":"completed"'.encode() not in received:
                received += one.recv(65536)
            assert b": alive\n\n" in received
    finally:
        for one in sockets:
            one.close()
    # Connections to the database stay open for the next ones.
    server.wait_until(lambda: api.num_fds() <= files_before + 100, timeout_s=20, what="closed sockets")
    assert server.stop() == 0
    assert not [line for line in server.lines if "ERROR" in line or "Traceback" in line]


def test_stopping_ends_streams_at_once(start_server: "StartServer") -> None:
    server = start_server()
    with server.http.stream("GET", "/v1/events") as answer:
        events = answer.iter_bytes()
        assert next(events).startswith(b"retry:")
        api = server.child("api")
        began = time.monotonic()
        psutil.Process(api.pid).terminate()
        assert list(events) in ([], [b""])  # an orderly end, not a broken connection
        assert time.monotonic() - began < 3.0
