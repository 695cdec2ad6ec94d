"""Several API processes of one server on one port."""

from __future__ import annotations

import http.client
import json
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest
from waiting import wait_until

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = pytest.mark.integration

PROCESSES = 3


@pytest.fixture(scope="module")
def server_variables() -> dict[str, str]:
    return {"MEDSORA_API_PROCESSES": str(PROCESSES)}


def api_processes(server: RunningServer) -> list[psutil.Process]:
    """Those that run now."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "--fd" in child.cmdline()]


def ask(opened: ExitStack, server: RunningServer, path: str) -> http.client.HTTPResponse:
    """An answer over a connection of its own, which stays open."""
    url = server.http.base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60.0)
    opened.callback(connection.close)
    connection.request("GET", path)
    return connection.getresponse()


def answering(server: RunningServer, connections: int = 48) -> set[int]:
    """Processes that hold one of so many new connections, on each of which a request is answered."""
    port = server.http.base_url.port
    with ExitStack() as opened:
        for _ in range(connections):
            assert ask(opened, server, "/health/live").status == 200
        return {
            process.pid
            for process in api_processes(server)
            if any(
                one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port
                for one in process.net_connections("tcp")
            )
        }


def test_connections_are_divided_among_the_processes(server: RunningServer) -> None:
    assert len(answering(server)) == PROCESSES


def test_what_one_process_accepts_all_know(server: RunningServer) -> None:
    video = server.submit(seed=11)
    server.wait_for(video, "succeeded")
    with ExitStack() as opened:
        for _ in range(24):
            answer = ask(opened, server, f"/v1/videos/{video}")
            assert answer.status == 200
            assert json.load(answer)["status"] == "completed"


def test_requests_wait_for_a_process_that_was_killed_and_none_is_refused(server: RunningServer) -> None:
    before = {process.pid for process in api_processes(server)}
    victim = min(before)
    psutil.Process(victim).send_signal(signal.SIGKILL)
    answering(server)  # asserts that every request is answered
    wait_until(lambda: len(api_processes(server)) == PROCESSES, timeout_s=60.0, what="a process in its place")
    assert before & {process.pid for process in api_processes(server)} == before - {victim}
