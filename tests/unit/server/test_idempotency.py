"""Idempotency-Key: one object for a key, whatever is sent twice, and whoever dies in between (F26)."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, update

from server.api.dependencies import Services
from server.app import create_app
from server.errors import InProgressError
from server.idempotency import (
    Answer,
    Begun,
    IdempotentRequest,
    IdempotentRequests,
    InProgress,
    Made,
    OtherRequest,
    note_made,
    working_on,
)
from server.jobs.database import Database, database_now
from server.jobs.model import Job
from server.keys.model import ALL_SCOPES
from server.sealing import Sealer
from server.settings import Settings

PROMPT = {"prompt": "covid-convex"}


@pytest.fixture
def settings_database(database_url: str) -> SecretStr:
    """All of this is done on both databases."""
    return SecretStr(database_url)


@pytest.fixture
def requests(database: Database, sealer: Sealer) -> IdempotentRequests:
    return IdempotentRequests(database, sealer)


def begun(outcome: object) -> Begun:
    assert isinstance(outcome, Begun)
    return outcome


def change(database: Database, **values: Any) -> None:
    with database.write() as connection:
        connection.execute(update(IdempotentRequest).values(**values))


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def post(client: TestClient, key: str, path: str = "/v1/videos", **request: Any) -> Any:
    headers = {"idempotency-key": key, **request.pop("headers", {})}
    return client.post(path, headers=headers, **(request or {"json": PROMPT}))


def num_jobs(client: TestClient) -> int:
    return len(client.get("/v1/videos", params={"limit": 100}).json()["data"])


# -- rows ----------------------------------------------------------------------------------------------------


def test_life_of_a_key(requests: IdempotentRequests, database: Database) -> None:
    first = begun(requests.begin("a", "k", "f"))
    assert isinstance(requests.begin("a", "k", "f"), InProgress)
    assert isinstance(requests.begin("a", "k", "g"), OtherRequest)
    assert isinstance(requests.begin("b", "k", "g"), Begun), "keys of tenants have nothing to do with each other"
    answer = Answer(200, "application/json", b"{}")
    requests.finish(first, answer)
    assert requests.begin("a", "k", "f") == answer
    assert isinstance(requests.begin("a", "k", "g"), OtherRequest)
    change(database, created_at=database_now() - 86_401)
    assert isinstance(requests.begin("a", "k", "g"), Begun), "kept for a day"
    with database.read() as connection:
        assert len(connection.execute(select(IdempotentRequest.key)).all()) == 1, "what is older goes"


def test_what_was_refused_may_be_sent_again(requests: IdempotentRequests) -> None:
    requests.release(begun(requests.begin("a", "k", "f")))
    assert isinstance(requests.begin("a", "k", "g"), Begun)


def test_a_lost_request_is_taken_over_once(requests: IdempotentRequests, database: Database) -> None:
    lost = begun(requests.begin("a", "k", "f"))
    change(database, lease_until=database_now() - 1)
    new = begun(requests.begin("a", "k", "f"))
    assert isinstance(requests.begin("a", "k", "f"), InProgress)
    with working_on(lost), pytest.raises(InProgressError), database.write() as connection:
        note_made(connection, "video_1")
    requests.finish(lost, Answer(200, "application/json", b"late"))
    requests.release(lost)
    assert isinstance(requests.begin("a", "k", "f"), InProgress), "the lost one has no say any more"
    with working_on(new), database.write() as connection:
        note_made(connection, "video_2")
        note_made(connection, "video_3")
    change(database, lease_until=database_now() - 1)
    assert requests.begin("a", "k", "f") == Made("video_2")


def test_what_is_made_without_a_key_is_not_noted(database: Database) -> None:
    with database.write() as connection:
        note_made(connection, "video_1")
    with database.read() as connection:
        assert connection.execute(select(IdempotentRequest.key)).all() == []


# -- over HTTP -------------------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_answer(client: TestClient) -> None:
    first = post(client, "k")
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    services_of(client).repository.claim(first.json()["id"], worker="w")
    again = post(client, "k")
    assert (again.status_code, again.content) == (200, first.content), "the answer of then, not of now"
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert post(client, "other").json()["id"] != first.json()["id"]
    assert num_jobs(client) == 2


def test_another_request_under_the_same_key_is_refused(client: TestClient) -> None:
    video = post(client, "k").json()["id"]
    others: list[dict[str, Any]] = [
        {"json": {**PROMPT, "seed": 1}},
        {"json": {"prompt": "regular-convex"}},
        {"json": PROMPT, "params": {"a": "1"}},
        {"data": PROMPT},
        {"path": f"/v1/videos/{video}/remix", "json": PROMPT},
        {"path": "/v1/batches", "json": PROMPT},
        {"content": b"{", "headers": {"content-type": "application/json"}},
    ]
    for other in others:
        answer = post(client, "k", **other)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "idempotency_key_reused"), other
        assert error["param"] == "idempotency-key"
    assert num_jobs(client) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"prompt": "covid-convex", "seed": 3}', b'{"seed":3,\n "prompt":"covid\\u002dconvex"}'),
        (
            b'{"prompt": "covid-convex", "extra_body": {"fps": 8, "seed": 3}}',
            b'{"extra_body": {"seed": 3, "fps": 8}, "prompt": "covid-convex"}',
        ),
    ],
)  # fmt: skip
def test_json_is_known_by_what_it_says(client: TestClient, one: bytes, other: bytes) -> None:
    headers = {"content-type": "application/json"}
    first = post(client, "k", content=one, headers=headers)
    assert first.status_code == 200, first.text
    assert post(client, "k", content=other, headers=headers).content == first.content


def form(boundary: str, *parts: tuple[str, str]) -> dict[str, Any]:
    lines = []
    for disposition, content in parts:
        lines += [f"--{boundary}", f"content-disposition: form-data; {disposition}", "", content]
    body = "\r\n".join([*lines, f"--{boundary}--", ""])
    return {"content": body.encode(), "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def test_forms_are_known_by_their_fields(client: TestClient) -> None:
    first = post(client, "k", **form("one", ('name="prompt"', "covid-convex"), ('name="seed"', "3")))
    assert first.status_code == 200, first.text
    same = form("another", ('name="seed"', "3"), ('name="prompt"', "covid-convex"))
    assert post(client, "k", **same).content == first.content
    for parts in (
        (('name="prompt"', "covid-convex"), ('name="seed"', "4")),
        (('name="prompt"', "covid-convex"),),
        (('name="prompt"', "covid-convex"), ('name="seed"', "3"), ('name="seed"', "3")),
        (('name="prompt"', "covid-convex"), ('name="seed"; filename="x"', "3")),
    ):
        assert post(client, "k", **form("one", *parts)).status_code == 422, parts


def test_uploads_are_known_by_their_content(client: TestClient, settings: Settings) -> None:
    large = b'{"a": 1}\n' * 200_000  # is held on disk while it is looked at
    sent = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", large)}}
    first = post(client, "k", "/v1/files", **sent)
    assert first.status_code == 200, first.text
    assert first.json()["bytes"] == len(large)
    assert client.get(f"/v1/files/{first.json()['id']}/content").content == large
    assert post(client, "k", "/v1/files", **sent).content == first.content
    for files in ({"file": ("b.jsonl", large)}, {"file": ("a.jsonl", large + b"\n")}):
        assert post(client, "k", "/v1/files", data=sent["data"], files=files).status_code == 422
    assert len(client.get("/v1/files").json()["data"]) == 1
    assert len([path for path in settings.files_dir.rglob("*") if path.is_file()]) == 1
    made = post(client, "b", "/v1/batches", json={
        "input_file_id": first.json()["id"], "endpoint": "/v1/videos", "completion_window": "24h",
    })  # fmt: skip
    again = post(client, "b", "/v1/batches", json={
        "completion_window": "24h", "endpoint": "/v1/videos", "input_file_id": first.json()["id"],
    })  # fmt: skip
    assert (made.status_code, again.content) == (200, made.content)
    assert len(client.get("/v1/batches").json()["data"]) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "\u00e9".encode(), b"a\x7f"])
def test_keys_that_do_not_do(client: TestClient, key: str | bytes) -> None:
    answer = client.post("/v1/videos", json=PROMPT, headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")
    assert num_jobs(client) == 0
    assert post(client, "x" * 255).status_code == 200


def test_two_keys_at_once_do_not_do(client: TestClient) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert client.post("/v1/videos", json=PROMPT, headers=headers).status_code == 400


def test_what_was_refused_does_not_use_up_the_key(client: TestClient, settings: Settings) -> None:
    assert post(client, "k", json={"prompt": "a cat"}).status_code == 400
    for number in range(settings.max_queued_jobs):
        assert post(client, f"fill{number}").status_code == 200
    full = post(client, "k")
    assert (full.status_code, full.headers["x-should-retry"]) == (429, "true")
    services_of(client).repository.claim(client.get("/v1/videos").json()["data"][0]["id"], worker="w")
    assert post(client, "k").status_code == 200


def test_a_request_that_is_being_worked_on(client: TestClient, settings: Settings) -> None:
    path, body = "/v1/videos", PROMPT
    services = services_of(client)
    seen: list[Any] = []
    real = services.jobs.submit

    def submit(*arguments: Any) -> Any:
        if not seen:
            seen.append(None)
            seen[0] = post(client, "k", path, json=body)
        return real(*arguments)

    services.jobs.submit = submit  # type: ignore[method-assign]
    answer = post(client, "k", path, json=body)
    assert answer.status_code == 200
    (early,) = seen
    assert (early.status_code, early.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    assert early.headers["x-should-retry"] == "true"
    assert int(early.headers["retry-after-ms"]) > 0
    assert post(client, "k", path, json=body).content == answer.content
    assert num_jobs(client) == 1


def test_a_server_that_died_after_it_had_made_the_video(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job was committed, its answer never sent: the key leads to that job, and makes no other."""
    services = services_of(client)
    requests = services.idempotent_requests
    with monkeypatch.context() as patched:
        patched.setattr(requests, "finish", lambda begun, answer: None)
        made = post(client, "k").json()["id"]
    assert post(client, "k").status_code == 409
    change(services.database, lease_until=database_now() - 1)
    services.repository.claim(made, worker="w")
    for _ in range(2):
        answer = post(client, "k")
        assert answer.status_code == 200
        assert (answer.json()["id"], answer.json()["status"]) == (made, "in_progress"), "as it is now"
        assert answer.headers["idempotent-replayed"] == "true"
    assert num_jobs(client) == 1


def test_a_failure_after_the_video_was_made(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(job: object) -> None:
        raise RuntimeError("planned")

    with monkeypatch.context() as patched:
        patched.setattr("server.api.videos.VideoObject.of", break_down)
        assert post(client, "k").status_code == 500
    answer = post(client, "k")
    assert answer.status_code == 200
    assert answer.headers["idempotent-replayed"] == "true"
    assert num_jobs(client) == 1


def test_tenants_do_not_meet_in_a_key(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"keys": "required"}))) as client:
        bearers = []
        for tenant in ("a", "a", "b"):
            _, key = services_of(client).keys.create(tenant=tenant, name="n", scopes=ALL_SCOPES)
            bearers.append({"authorization": f"Bearer {key}"})
        first, same, theirs = (post(client, "k", json=PROMPT, headers=bearer).json()["id"] for bearer in bearers)
        assert first == same
        assert theirs != first
        assert post(client, "k", json={**PROMPT, "seed": 1}, headers=bearers[2]).status_code == 422
        assert post(client, "k", json=PROMPT).status_code == 401


@pytest.fixture
def two_apps(
    settings: Settings, open_two_apps: Callable[[Settings], AbstractContextManager[list[TestClient]]]
) -> Iterator[list[TestClient]]:
    with open_two_apps(settings.model_copy(update={"max_queued_jobs": 1000})) as apps:
        yield apps


@pytest.mark.parametrize("how", ["json", "data"])
def test_fifty_at_once_make_one_video(two_apps: list[TestClient], how: str) -> None:
    def send(number: int) -> Any:
        while True:
            answer = post(two_apps[number % 2], "k", **{how: PROMPT})
            if answer.status_code != 409:
                return answer
            assert answer.headers["x-should-retry"] == "true"

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert num_jobs(two_apps[0]) == 1


def test_remixes_too(client: TestClient, add_remixable: Callable[[TestClient], str]) -> None:
    path = f"/v1/videos/{add_remixable(client)}/remix"
    first = post(client, "k", path, json={"prompt": "regular-convex"})
    assert first.status_code == 200, first.text
    assert post(client, "k", path, json={"prompt": "regular-convex"}).content == first.content
    assert json.loads(first.content)["remixed_from_video_id"] in path


@pytest.fixture
def add_remixable() -> Callable[[TestClient], str]:
    def add(client: TestClient) -> str:
        job_id = str(client.post("/v1/videos", json=PROMPT).json()["id"])
        with services_of(client).database.write() as connection:
            connection.execute(update(Job).where(Job.id == job_id).values(status="succeeded"))
        return job_id

    return add
