"""/v1/batches: what is accepted, listed and cancelled. What becomes of the lines is in ``test_batch_runner.py``."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from server.app import create_app
from server.batches.model import ACTIVE, TRANSITIONS, Batch, BatchStatus
from server.jobs.database import Database
from server.settings import Settings


@pytest.fixture
def input_file(client: TestClient) -> str:
    """An uploaded file."""
    answer = client.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"})
    return str(answer.json()["id"])


@pytest.fixture
def create(client: TestClient, input_file: str) -> Callable[..., Any]:
    """Ask for a batch; returns the answer."""

    def send(**changes: Any) -> Any:
        body = {"input_file_id": input_file, "endpoint": "/v1/videos", "completion_window": "24h", **changes}
        return client.post("/v1/batches", json={name: value for name, value in body.items() if value is not ...})

    return send


def change_batch(settings: Settings, batch_id: str, **values: Any) -> None:
    database = Database(settings.database_address)
    with database.write() as connection:
        connection.execute(update(Batch).where(Batch.id == batch_id).values(**values))
    database.close()


def test_a_batch_is_accepted(client: TestClient, create: Callable[..., Any], input_file: str) -> None:
    made = create(metadata={"study": "7"}).json()
    assert made == {
        "id": made["id"],
        "object": "batch",
        "endpoint": "/v1/videos",
        "input_file_id": input_file,
        "completion_window": "24h",
        "status": "validating",
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
        "created_at": made["created_at"],
        "in_progress_at": None,
        "expires_at": made["created_at"] + 86_400,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"study": "7"},
    }
    assert client.get(f"/v1/batches/{made['id']}").json() == made


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint", "allowed: /v1/videos"),
        ({"completion_window": "25h"}, "completion_window", "allowed: 1h, 6h, 12h, 24h, 3d, 7d"),
        ({"completion_window": ...}, "completion_window", "is required"),
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id", "there is no file"),
        ({"input_file_id": 7}, "input_file_id", "string"),
        ({"model": "x"}, "model", "is not a known field; allowed: input_file_id"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "has 17 pairs; allowed: 16"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "allowed: 1 to 64"),
        ({"metadata": {"": "v"}}, "metadata", "allowed: 1 to 64"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "'k' has 513 characters; allowed: up to 512"),
        ({"metadata": {"k": 1}}, "metadata", "string"),
        ({"metadata": {"k": "a\0"}}, "metadata", "that are text"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after", "3600"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 2_592_001}}, "output_expires_after", "2592000"),
        ({"output_expires_after": {"seconds": 7200}}, "output_expires_after.anchor", "is required"),
    ],
)
def test_what_is_wrong_is_named(create: Callable[..., Any], changes: dict[str, Any], param: str, message: str) -> None:
    answer = create(**changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_wrong_bodies(client: TestClient) -> None:
    for content, kind, status in (
        (b"[]", "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"endpoint": "a", "endpoint": "b"}', "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
    ):
        answer = client.post("/v1/batches", content=content, headers={"content-type": kind})
        assert answer.status_code == status, answer.text


def test_only_so_many_may_be_unfinished(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"max_active_batches": 2}))) as client:
        upload = client.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"})
        body = {"input_file_id": upload.json()["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        answers = [client.post("/v1/batches", json=body) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert int(answers[2].headers["retry-after"]) > 0
        change_batch(settings, answers[0].json()["id"], status="failed")
        assert client.post("/v1/batches", json=body).status_code == 200


def test_lists_are_paged_newest_first(client: TestClient, create: Callable[..., Any]) -> None:
    ids = [create().json()["id"] for _ in range(5)]
    seen: list[str] = []
    after = ""
    while True:
        page = client.get("/v1/batches", params={"limit": 2, "after": after}).json()
        seen += [batch["id"] for batch in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == ids[::-1]
    answer = client.get("/v1/batches", params={"after": "batch_1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")


def test_cancelling(client: TestClient, create: Callable[..., Any], settings: Settings) -> None:
    batch_id = create().json()["id"]
    first = client.post(f"/v1/batches/{batch_id}/cancel").json()
    assert first["status"] == "cancelling"
    assert first["cancelling_at"] is not None
    assert client.post(f"/v1/batches/{batch_id}/cancel").json() == first, "asking again changes nothing"
    for status in ("finalizing", "completed", "failed", "expired"):
        change_batch(settings, batch_id, status=status)
        answer = client.post(f"/v1/batches/{batch_id}/cancel")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert status in answer.json()["error"]["message"]
        assert client.get(f"/v1/batches/{batch_id}").json()["status"] == status


def test_batches_of_another_tenant_do_not_exist(
    client: TestClient, create: Callable[..., Any], settings: Settings
) -> None:
    batch_id = create().json()["id"]
    change_batch(settings, batch_id, tenant="another")
    assert client.get("/v1/batches").json()["data"] == []
    assert client.get("/v1/batches", params={"after": batch_id}).status_code == 400
    for method, path in (("GET", ""), ("POST", "/cancel")):
        for unknown in (batch_id, "batch_1"):
            answer = client.request(method, f"/v1/batches/{unknown}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "batch_not_found")


def test_only_states_that_nothing_follows_are_final() -> None:
    assert {status for status, following in TRANSITIONS.items() if following} == set(ACTIVE)
    assert set(TRANSITIONS) == set(BatchStatus)
