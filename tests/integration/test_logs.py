"""The log of a whole server: JSON from every process, what belongs together, and nothing that callers wrote."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CANARY = "zzcanaryzz"
SECRET = "whsec_" + base64.b64encode(b"a secret of our own for webhooks").decode()


def make_key(server: "RunningServer") -> str:
    command = [sys.executable, "-m", "server.cli", "keys", "create", "--name", "test", "--tenant", "clinic"]
    command += ["--data-dir", str(server.data_dir)]
    root = Path(__file__).parents[2]
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return next(word for word in made.stdout.split() if word.startswith("medsora_"))


@pytest.fixture
def server(start_server: "StartServer") -> "RunningServer":
    return start_server(MEDSORA_LOG_FORMAT="json", MEDSORA_LOG_LEVEL="debug", MEDSORA_KEYS="required")


def parsed(server: "RunningServer") -> list[dict[str, Any]]:
    found = []
    for line in server.lines:
        if line.strip() and not line.startswith("worker: "):  # Celery's word on a signal, on standard output
            found.append(json.loads(line))
    return found


def test_nothing_that_callers_wrote_is_logged(server: "RunningServer") -> None:
    key = make_key(server)
    http = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=30.0)

    def post(path: str, status: int, **what: Any) -> dict[str, Any]:
        answer = http.post(path, **what)
        assert answer.status_code == status, answer.text
        return {**answer.json(), "request_id": answer.headers["x-request-id"]}

    idempotent = {"idempotency-key": CANARY}
    body = {
        "prompt": f"covid lung {CANARY}",
        "num_inference_steps": 2,
        "webhook_url": f"https://{CANARY}.invalid/{CANARY}",
        "webhook_secret": SECRET,
    }
    answer = http.post("/videos", json=body, headers=idempotent)
    if answer.status_code != 200:  # the vocabulary takes no foreign word
        body["prompt"] = "covid lung"
        answer = http.post("/videos", json=body, headers={"idempotency-key": CANARY + "2"})
    assert answer.status_code == 200, answer.text
    video = {**answer.json(), "request_id": answer.headers["x-request-id"]}
    post("/videos", 400, json={"prompt": f"{CANARY} nothing of the kind"})
    post("/videos", 400, json={"prompt": "covid lung", CANARY: CANARY})
    post("/videos", 400, content=f'{{"prompt": "{CANARY}'.encode(), headers={"content-type": "application/json"})
    assert http.get(f"/videos/{CANARY}").status_code == 404
    assert http.get("/videos", params={"after": CANARY}).status_code == 400
    assert http.get("/videos", headers={"authorization": f"Bearer {key[:-4]}{CANARY}"}).status_code == 401
    lines = [
        {"custom_id": CANARY, "method": "POST", "url": "/v1/videos", "body": {"prompt": CANARY}},
        {
            "custom_id": CANARY + "2",
            "method": "POST",
            "url": "/v1/videos",
            "body": {"prompt": "covid lung", "num_inference_steps": 2},
        },
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    file = post("/files", 200, data={"purpose": "batch"}, files={"file": (f"{CANARY}.jsonl", text)})
    batch = {"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
    batch_id = post("/batches", 200, json={**batch, "metadata": {CANARY: CANARY}})["id"]
    webhook = {"url": f"https://127.0.0.1:9/{CANARY}", "events": ["video.completed"]}
    http.post("/webhooks", json=webhook)
    server.wait_for(video["id"], "succeeded")
    server.wait_until(
        lambda: http.get(f"/batches/{batch_id}").json()["status"] == "completed", timeout_s=60, what="the batch"
    )
    metrics = server.http.get("/metrics").text
    http.close()
    assert server.stop() == 0
    everything = "\n".join([*server.lines, metrics, (server.data_dir / "redis.log").read_text()])
    found = [
        line
        for line in everything.splitlines()
        if any(word in line for word in (CANARY, key[25:], SECRET[6:], "covid lung"))
    ]
    assert found == []

    of_all = parsed(server)
    assert {line["part"] for line in of_all} >= {"serve", "api", "worker"}
    of_request = [line for line in of_all if line.get("request_id") == video["request_id"]]
    of_job = [line for line in of_all if line.get("job_id") == video["id"]]
    assert {line["part"] for line in of_request} >= {"api", "worker"}
    assert {line["part"] for line in of_job} >= {"api", "worker"}
    assert {line["tenant"] for line in of_job} == {"clinic"}
