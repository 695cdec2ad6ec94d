"""CRUD of /v1/webhooks, the log of deliveries, and webhook_url of a request."""

import base64
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.api.dependencies import Services
from server.settings import Settings
from server.webhooks.model import KINDS, new_webhook_id
from server.webhooks.signature import is_secret, new_secret

URL = "https://example.com/hook"


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": URL, **fields})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def cancel_one(client: TestClient, **fields: Any) -> str:
    job_id = str(client.post("/v1/videos", json={"prompt": "covid-convex", **fields}).json()["id"])
    services_of(client).jobs.cancel("default", job_id)
    return job_id


def test_the_secret_is_told_once(client: TestClient) -> None:
    made = create(client)
    assert is_secret(made["secret"])
    assert made["events"] == list(KINDS)
    assert made["url"] == URL
    read = client.get(f"/v1/webhooks/{made['id']}").json()
    assert read == {**made, "secret": None}
    assert client.get("/v1/webhooks").json() == {"object": "list", "data": [read]}
    changed = client.post(f"/v1/webhooks/{made['id']}", json={"events": ["video.failed"]}).json()
    assert changed == {**read, "events": ["video.failed"]}
    moved = client.post(f"/v1/webhooks/{made['id']}", json={"url": "https://example.org/"}).json()
    assert moved == {**changed, "url": "https://example.org/"}
    assert client.delete(f"/v1/webhooks/{made['id']}").json()["deleted"] is True
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/deliveries")):
        assert client.request(method, f"/v1/webhooks/{made['id']}{path}").status_code == 404
    assert client.post(f"/v1/webhooks/{made['id']}", json={}).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "http://127.1/"}, "url"),
        ({"url": "http://169.254.169.254/latest/meta-data"}, "url"),
        ({"url": "https://user:pw@example.com/"}, "url"),
        ({"url": "x" * 2001}, "url"),
        ({"url": 5}, "url"),
        ({"url": None}, "url"),
        ({"events": []}, "events"),
        ({"events": ["video.completed", "video.completed"]}, "events"),
        ({"events": ["video.progress"]}, "events"),
        ({"secret": "x"}, "secret"),
    ],
)
def test_refusals_name_the_field(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/webhooks", json={"url": URL, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert client.get("/v1/webhooks").json()["data"] == []
    webhook_id = create(client)["id"]
    if fields != {"url": None}:
        answer = client.post(f"/v1/webhooks/{webhook_id}", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_there_may_be_twenty(client: TestClient) -> None:
    for _ in range(20):
        create(client)
    answer = client.post("/v1/webhooks", json={"url": URL})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_webhooks")


def test_log_of_deliveries(client: TestClient) -> None:
    webhook_id = create(client)["id"]
    ids = [cancel_one(client) for _ in range(3)]
    first = client.get(f"/v1/webhooks/{webhook_id}/deliveries", params={"limit": 2}).json()
    assert [one["subject"] for one in first["data"]] == ids[:0:-1]
    assert first["has_more"] is True
    delivery = first["data"][0]
    assert (delivery["type"], delivery["status"], delivery["attempts"]) == ("video.failed", "pending", 0)
    assert delivery["next_attempt_at"] is not None
    rest = client.get(f"/v1/webhooks/{webhook_id}/deliveries", params={"after": first["last_id"]}).json()
    assert [one["subject"] for one in rest["data"]] == ids[:1]
    answer = client.get(f"/v1/webhooks/{webhook_id}/deliveries", params={"after": "msg_x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
    assert client.get(f"/v1/webhooks/{new_webhook_id()}/deliveries").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"webhook_url": "http://[::1]/", "webhook_secret": new_secret()}, "webhook_url"),
        ({"webhook_url": URL}, "webhook_secret"),
        ({"webhook_url": URL, "webhook_secret": "whsec_short"}, "webhook_secret"),
        ({"webhook_secret": new_secret()}, "webhook_url"),
    ],
)
def test_bad_address_of_a_request(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/videos", json={"prompt": "covid-convex", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert client.get("/v1/videos").json()["data"] == []


def test_address_of_a_request_is_told_to_nobody(client: TestClient) -> None:
    secret = new_secret()
    made = client.post(
        "/v1/videos", data={"prompt": "covid-convex", "webhook_url": URL, "webhook_secret": secret}
    )  # a form, as OpenAI's client sends it
    assert made.status_code == 200, made.text
    assert secret not in made.text
    assert secret not in client.get(f"/v1/videos/{made.json()['id']}").text
    services_of(client).jobs.cancel("default", made.json()["id"])
    (due,) = services_of(client).webhooks._repository.claim_due(limit=9, lease_s=9.0, max_attempts=3)
    assert (due.delivery.url, due.secret) == (URL, secret)


def test_no_secret_is_on_the_disk_in_clear(client: TestClient, settings: Settings) -> None:
    given = new_secret()
    answers = [
        client.post("/v1/webhooks", json={"url": URL}, headers={"idempotency-key": "k"}).json() for _ in range(2)
    ]
    assert answers[0] == answers[1], "what is kept to be answered again tells the secret, too"
    cancel_one(client, webhook_url=URL, webhook_secret=given)
    files = {path.name: path for path in settings.data_dir.iterdir() if path.is_file()}
    assert {"medsora.db", "medsora.db-wal", "secrets.key"} <= set(files)
    for name, path in files.items():
        content = path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0, name
        for secret in (given, answers[0]["secret"]):
            assert secret.encode() not in content, name
            assert base64.b64decode(secret.removeprefix("whsec_")) not in content, name
    due = services_of(client).webhooks._repository.claim_due(limit=9, lease_s=9.0, max_attempts=3)
    assert sorted(str(one.secret) for one in due) == sorted([given, answers[0]["secret"]])
