"""Webhooks from a whole server whose parts are killed: nothing that ended goes untold."""

import http.server
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from conftest import StartServer

pytestmark = pytest.mark.integration


def test_every_end_is_told_although_senders_are_killed(start_server: "StartServer") -> None:
    received: list[tuple[dict[str, str], bytes]] = []
    is_slow = threading.Event()
    is_slow.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = self.rfile.read(length)
            if len(body) < length:  # its sender was killed in the middle
                return
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if is_slow.is_set():
                time.sleep(0.3)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    try:
        server = start_server(MEDSORA_WEBHOOK_PRIVATE_HOSTS="127.0.0.1", MEDSORA_WEBHOOK_INTERVAL_S="0.1")
        url = f"http://127.0.0.1:{receiver.server_address[1]}/"
        webhook = server.http.post("/v1/webhooks", json={"url": url}).json()
        ids = [server.submit(seed=seed) for seed in range(20)]
        for killed in range(5):
            server.wait_until(lambda least=killed: len(received) > least, timeout_s=60, what="a message")  # type: ignore[misc]
            os.kill(server.child("reaper").pid, signal.SIGKILL)
            time.sleep(0.3)
        is_slow.clear()
        for job_id in ids:
            server.wait_for(job_id, "succeeded", timeout_s=90)
        log = lambda: server.http.get(f"/v1/webhooks/{webhook['id']}/deliveries?limit=100").json()["data"]  # noqa: E731
        # What was being sent when its sender was killed is sent again once 30 s are over.
        server.wait_until(
            lambda: {one["status"] for one in log()} == {"delivered"} and len(log()) == len(ids),
            timeout_s=90,
            what=lambda: str(log()),
        )
        client = openai.OpenAI(api_key="any", webhook_secret=webhook["secret"])
        told = [client.webhooks.unwrap(body, headers) for headers, body in received]
        assert {str(event.type) for event in told} == {"video.completed"}
        assert {event.data.id for event in told} == set(ids)
        by_id = {headers["webhook-id"]: body for headers, body in received}
        assert len(by_id) == len(ids)  # what came twice came under one id
    finally:
        receiver.shutdown()
        receiver.server_close()
