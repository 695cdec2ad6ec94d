"""Streams of events that have an end; those that have none are in ``tests/integration/test_events.py``."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete

from server.api.dependencies import Services
from server.events.model import Event

UNKNOWN = f"video_{'0' * 32}"


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def parse(text: str) -> list[dict[str, Any]]:
    """Events of a stream: id, event, data."""
    events = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        fields = {name: value for name, _, value in lines}
        if "data" in fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


@pytest.fixture
def ended(client: TestClient) -> str:
    """A job that has failed after two steps."""
    job_id = str(client.post("/v1/videos", json={"prompt": "covid-convex"}).json()["id"])
    repository = services_of(client).repository
    repository.claim(job_id, worker="w")
    repository.fail(job_id, 1, code="out_of_memory", message="Too little memory.")
    return job_id


def test_all_of_a_job_from_the_beginning(client: TestClient, ended: str) -> None:
    answer = client.get(f"/v1/videos/{ended}/events")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert answer.text.startswith("retry: 1000\n\n")
    events = parse(answer.text)
    assert [event["event"] for event in events] == ["video.queued", "video.started", "video.failed"]
    last = events[-1]["data"]
    assert (last["object"], last["type"]) == ("event", "video.failed")
    assert last["data"]["error"] == {"code": "out_of_memory", "message": "Too little memory."}
    assert len(services_of(client).follower) == 0


def test_replay(client: TestClient, ended: str) -> None:
    first, second, last = parse(client.get(f"/v1/videos/{ended}/events").text)
    for place in ({"headers": {"last-event-id": first["id"]}}, {"params": {"last_event_id": first["id"]}}):
        assert parse(client.get(f"/v1/videos/{ended}/events", **place).text) == [second, last]  # type: ignore[arg-type]
    # The browser's own client comes back with the header, whatever the address says.
    both = {"headers": {"last-event-id": second["id"]}, "params": {"last_event_id": "0"}}
    assert parse(client.get(f"/v1/videos/{ended}/events", **both).text) == [last]  # type: ignore[arg-type]
    over = client.get(f"/v1/videos/{ended}/events", headers={"last-event-id": last["id"]})
    assert (over.status_code, over.content) == (204, b"")
    assert len(services_of(client).follower) == 0


def test_end_that_is_kept_no_more(client: TestClient, ended: str) -> None:
    with services_of(client).database.write() as connection:
        connection.execute(delete(Event))
    (event,) = parse(client.get(f"/v1/videos/{ended}/events").text)
    assert (event["event"], "id" in event) == ("video.failed", False)
    assert event["data"]["data"]["error"]["code"] == "out_of_memory"


def test_previews_only_for_those_who_ask(client: TestClient, ended: str) -> None:
    job_id = str(client.post("/v1/videos", json={"prompt": "covid-convex"}).json()["id"])
    repository = services_of(client).repository
    repository.claim(job_id, worker="w")
    repository.show_preview(job_id, 1, b"x", steps_done=1)
    with services_of(client).database.write() as connection:
        from server.events.log import emit

        emit(connection, tenant="default", kind="video.deleted", subject=job_id, data={"id": job_id})
    plain = parse(client.get(f"/v1/videos/{job_id}/events").text)
    assert [event["event"] for event in plain] == ["video.queued", "video.started", "video.deleted"]
    shown = parse(client.get(f"/v1/videos/{job_id}/events", params={"preview": "true"}).text)
    assert [event["event"] for event in shown] == ["video.queued", "video.started", "video.preview", "video.deleted"]
    assert repository.previews_wanted([job_id])


@pytest.mark.parametrize("place", ["-1", "x", "1.5", "9" * 19, "\u0661"])
def test_bad_place(client: TestClient, ended: str, place: str) -> None:
    answer = client.get(f"/v1/videos/{ended}/events", params={"last_event_id": place})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "last_event_id"
    assert "whole number" in answer.json()["error"]["message"]


@pytest.mark.parametrize("job_id", [UNKNOWN, "video_x"])
def test_unknown_video(client: TestClient, job_id: str) -> None:
    answer = client.get(f"/v1/videos/{job_id}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert len(services_of(client).follower) == 0
