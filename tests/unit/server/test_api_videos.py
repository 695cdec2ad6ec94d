"""GET, list, content and DELETE of /v1/videos; models, health, metrics; errors nobody planned."""

import hashlib
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Connection, event, update

from server.api.dependencies import Caller, Services, get_caller
from server.app import create_app
from server.errors import NotFoundError
from server.jobs.model import Job
from server.jobs.repository import FinishedWork
from server.keys.model import ALL_SCOPES
from server.settings import Settings
from server.storage import Variant

CONTENT = bytes(range(256)) * 4
UNKNOWN = f"video_{'0' * 32}"


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def create(client: TestClient, **fields: Any) -> str:
    response = client.post("/v1/videos", json={"prompt": "covid-convex", **fields})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def accept(path: Path) -> None:
    assert path.is_file()


def complete(client: TestClient, content: bytes = CONTENT, *, stills: bool = True, **fields: Any) -> str:
    """A job that a worker has finished."""
    job_id = create(client, **fields)
    services = services_of(client)
    claim = services.repository.claim(job_id, worker="w")
    assert claim is not None
    stored = {}
    for variant in Variant if stills else (Variant.VIDEO,):
        data = content if variant is Variant.VIDEO else variant.encode() + content
        stored[variant] = services.store.write(
            job_id, claim.token, lambda path, data=data: path.write_bytes(data) and None, accept, variant=variant
        )
    info = stored[Variant.VIDEO]
    work = FinishedWork(
        artifact=info.name,
        size_bytes=info.size_bytes,
        sha256=info.sha256,
        thumbnail_sha256=stored[Variant.THUMBNAIL].sha256 if stills else None,
        spritesheet_sha256=stored[Variant.SPRITESHEET].sha256 if stills else None,
        sampling_s=0.5,
        encode_s=0.1,
        store_s=0.1,
    )
    assert services.repository.succeed(job_id, claim.token, work)
    return job_id


def test_completed_video(client: TestClient) -> None:
    video = client.get(f"/v1/videos/{complete(client)}").json()
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    assert video["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert video["inference_time_s"] == 0.5
    assert video["completed_at"] >= video["created_at"]


def test_progress_follows_the_steps(client: TestClient) -> None:
    job_id = create(client)
    repository = services_of(client).repository
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    seen = []
    for step in range(5):
        repository.renew(job_id, claim.token, steps_done=step)
        video = client.get(f"/v1/videos/{job_id}").json()
        assert video["status"] == "in_progress"
        seen.append(video["progress"])
    assert seen == [0, 25, 50, 75, 99]


def test_failed_job_is_an_answer_not_an_error(client: TestClient) -> None:
    job_id = create(client)
    repository = services_of(client).repository
    repository.claim(job_id, worker="w")
    repository.fail(job_id, 1, code="storage_full", message="No room.")
    response = client.get(f"/v1/videos/{job_id}")
    assert response.status_code == 200
    assert response.json()["status"] == "failed"
    assert response.json()["error"] == {"code": "storage_full", "message": "No room."}


def test_canceled_job_ends_the_waiting_of_clients(client: TestClient) -> None:
    job_id = create(client)
    services_of(client).jobs.cancel("default", job_id)
    video = client.get(f"/v1/videos/{job_id}").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")


def poll_after_ms(client: TestClient, job_id: str) -> int:
    return int(client.get(f"/v1/videos/{job_id}").headers["openai-poll-after-ms"])


def test_poll_interval_is_told(client: TestClient) -> None:
    job_id = create(client)
    assert poll_after_ms(client, job_id) == 1000
    complete(client)  # 0.5 s for 4 steps: the pace is known now
    assert 200 <= poll_after_ms(client, job_id) < 1000
    slow = create(client, num_inference_steps=1000)
    assert poll_after_ms(client, slow) == 5000


def test_who_has_waited_for_long_is_told_to_ask_less_often(client: TestClient) -> None:
    """However little there is left to sample: it may be waiting to be stored."""
    complete(client)
    services, job_id = services_of(client), create(client)
    assert services.repository.claim(job_id, worker="w") is not None
    services.repository.renew(job_id, 1, steps_done=4)
    assert 200 <= poll_after_ms(client, job_id) < 1000
    with services.database.write() as connection:
        connection.execute(update(Job).where(Job.id == job_id).values(created_at=Job.created_at - 30.0))
    assert 3000 <= poll_after_ms(client, job_id) < 4000


def test_a_poll_takes_two_threads_of_the_pool(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who asks, and for the job: each costs more than most of what is done in it."""
    job_id = create(client)
    calls: list[Any] = []
    run_sync = anyio.to_thread.run_sync

    async def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(function)
        return await run_sync(function, *arguments, **options)

    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    client.get(f"/v1/videos/{job_id}")
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("video_id", [UNKNOWN, "video_x", "..", "%2e%2e%2fpasswd", "x" * 300])
def test_unknown_id(client: TestClient, method: str, video_id: str) -> None:
    response = client.request(method, f"/v1/videos/{video_id}")
    assert response.status_code in (404, 405)
    assert response.json()["error"]["code"] in ("video_not_found", "not_found", "method_not_allowed")


def test_list_pages(client: TestClient) -> None:
    ids = [create(client) for _ in range(5)]
    first = client.get("/v1/videos", params={"limit": 2}).json()
    assert first["object"] == "list"
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["first_id"], first["last_id"], first["has_more"]) == (ids[4], ids[3], True)
    second = client.get("/v1/videos", params={"limit": 3, "after": first["last_id"]}).json()
    assert [video["id"] for video in second["data"]] == ids[2::-1]
    assert second["has_more"] is False
    oldest = client.get("/v1/videos", params={"limit": 1, "order": "asc"}).json()
    assert oldest["first_id"] == ids[0]


def test_empty_list(client: TestClient) -> None:
    page = client.get("/v1/videos").json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param", "part"),
    [
        ("limit=0", "limit", "greater than or equal to 1"),
        ("limit=101", "limit", "less than or equal to 100"),
        ("limit=ten", "limit", "integer"),
        ("order=up", "order", "'asc' or 'desc'"),
        (f"after={UNKNOWN}", "after", "no video with the id"),
        ("after=../x", "after", "no video with the id"),
    ],
)
def test_bad_list_parameters(client: TestClient, query: str, param: str, part: str) -> None:
    response = client.get(f"/v1/videos?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert part in response.json()["error"]["message"]


def test_content_is_the_file(client: TestClient) -> None:
    job_id = complete(client)
    response = client.get(f"/v1/videos/{job_id}/content")
    assert (response.status_code, response.content) == (200, CONTENT)
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["etag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert f"{job_id}.mp4" in response.headers["content-disposition"]
    head = client.head(f"/v1/videos/{job_id}/content")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(CONTENT))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", CONTENT[:10]),
        ("bytes=1000-", CONTENT[1000:]),
        ("bytes=-24", CONTENT[-24:]),
        ("bytes=0-99999", CONTENT),
    ],
)
def test_range(client: TestClient, header: str, expected: bytes) -> None:
    response = client.get(f"/v1/videos/{complete(client)}/content", headers={"range": header})
    assert (response.status_code, response.content) == (206, expected)
    start = CONTENT.index(expected) if len(expected) < len(CONTENT) else 0
    start = len(CONTENT) - len(expected) if header != "bytes=0-9" else start
    assert response.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(CONTENT)}"


@pytest.mark.parametrize("header", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
def test_range_outside_of_the_file(client: TestClient, header: str) -> None:
    response = client.get(f"/v1/videos/{complete(client)}/content", headers={"range": header})
    assert response.status_code == 416
    assert response.headers["content-range"] == "bytes */1024"
    assert response.json()["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize(
    "header",
    ["lines=1-2", "bytes=9-1", "bytes=a-b", "bytes=", "bytes=-", "bytes=0-1," * 5000, "bytes=0-1,5-6", "bytes=\u00b2-"],
)
def test_range_that_is_no_single_range_is_overlooked(client: TestClient, header: str) -> None:
    url = f"/v1/videos/{complete(client)}/content"
    response = client.get(url, headers={"range": header.encode()})
    assert (response.status_code, response.content) == (200, CONTENT)


def test_conditional_requests(client: TestClient) -> None:
    url = f"/v1/videos/{complete(client)}/content"
    etag = client.get(url).headers["etag"]
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200
    same = client.get(url, headers={"range": "bytes=0-1", "if-range": etag})
    assert same.status_code == 206
    other = client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})
    assert (other.status_code, other.content) == (200, CONTENT)


def test_content_of_an_unfinished_job(client: TestClient) -> None:
    response = client.get(f"/v1/videos/{create(client)}/content")
    assert response.status_code == 409
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "video_not_ready"


def test_content_that_does_not_exist(client: TestClient) -> None:
    assert client.get(f"/v1/videos/{UNKNOWN}/content").status_code == 404
    job_id = complete(client)
    for file in services_of(client).store.files():
        services_of(client).store.remove(file.name)
    response = client.get(f"/v1/videos/{job_id}/content")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "content_missing")


@pytest.mark.parametrize(
    ("variant", "kind", "ending"),
    [("thumbnail", "image/webp", ".thumbnail.webp"), ("spritesheet", "image/jpeg", ".spritesheet.jpg")],
)
def test_stills_are_downloaded_like_the_video(client: TestClient, variant: str, kind: str, ending: str) -> None:
    job_id = complete(client)
    url, content = f"/v1/videos/{job_id}/content?variant={variant}", variant.encode() + CONTENT
    response = client.get(url)
    assert (response.status_code, response.content) == (200, content)
    assert response.headers["content-type"] == kind
    assert f"{job_id}{ending}" in response.headers["content-disposition"]
    etag = response.headers["etag"]
    assert etag == f'"{hashlib.sha256(content).hexdigest()}"'
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    part = client.get(url, headers={"range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, content[2:6])
    assert client.get(url, headers={"range": "bytes=9999-"}).status_code == 416
    assert client.head(url).headers["content-length"] == str(len(content))
    assert client.delete(f"/v1/videos/{job_id}").status_code == 200
    assert client.get(url).status_code == 404


def test_stills_of_an_unfinished_job(client: TestClient) -> None:
    response = client.get(f"/v1/videos/{create(client)}/content?variant=thumbnail")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "video_not_ready")
    assert response.headers["x-should-retry"] == "false"


def test_stills_that_an_older_version_did_not_make(client: TestClient) -> None:
    job_id = complete(client, stills=False)
    response = client.get(f"/v1/videos/{job_id}/content?variant=thumbnail")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "content_missing")
    assert "download variant=video" in response.json()["error"]["message"]
    assert client.get(f"/v1/videos/{job_id}/content?variant=video").content == CONTENT


def test_other_variants_are_refused(client: TestClient) -> None:
    response = client.get(f"/v1/videos/{complete(client)}/content", params={"variant": "gif"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "variant"
    assert "allowed: video, thumbnail, spritesheet" in response.json()["error"]["message"]


@pytest.mark.parametrize("variant", ["lossless", "dicom"])
def test_exact_copies_that_were_not_kept(client: TestClient, variant: str) -> None:
    response = client.get(f"/v1/videos/{complete(client, stills=False)}/content", params={"variant": variant})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "content_missing", "variant")
    assert "MEDSORA_KEEP_LOSSLESS" in error["message"]


@pytest.mark.parametrize("variant", ["preview", "dicom"])
def test_a_damaged_video_cannot_be_converted(client: TestClient, variant: str) -> None:
    response = client.get(f"/v1/videos/{complete(client)}/content", params={"variant": variant})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "conversion_failed")


def remix(client: TestClient, video_id: str, kind: str = "json", **fields: Any) -> Any:
    options = {"json": fields} if kind == "json" else {"files": {name: (None, text) for name, text in fields.items()}}
    return client.post(f"/v1/videos/{video_id}/remix", **options)  # type: ignore[arg-type]


SAME = ("model", "seed", "size", "seconds", "num_frames", "fps", "num_inference_steps", "guidance_scale", "sampler")


@pytest.mark.parametrize("kind", ["json", "multipart"])
def test_remix_changes_the_label_alone(client: TestClient, kind: str) -> None:
    source_id = complete(client, seed=41, num_inference_steps=7, guidance_scale=2.5, sampler="heun")
    source = client.get(f"/v1/videos/{source_id}").json()
    assert source["remixed_from_video_id"] is None
    response = remix(client, source_id, kind, prompt="Regular convex")
    assert response.status_code == 200, response.text
    made = response.json()
    assert (made["status"], made["progress"], made["remixed_from_video_id"]) == ("queued", 0, source_id)
    assert (made["prompt"], made["label"], source["label"]) == ("Regular convex", "regular-convex", "covid-convex")
    assert {name: made[name] for name in SAME} == {name: source[name] for name in SAME}
    assert made["seed"] == 41
    assert made["id"] != source_id
    client.delete(f"/v1/videos/{source_id}")
    assert client.get(f"/v1/videos/{made['id']}").json()["remixed_from_video_id"] == source_id


def test_remix_of_what_is_not_there(client: TestClient) -> None:
    deleted = complete(client)
    client.delete(f"/v1/videos/{deleted}")
    for video_id in (UNKNOWN, "x", deleted):
        response = remix(client, video_id, prompt="covid-convex")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "video_not_found")


def test_remix_of_what_is_not_completed(client: TestClient) -> None:
    waiting, canceled = create(client), create(client)
    services_of(client).jobs.cancel("default", canceled)
    for video_id, code in ((waiting, "video_not_ready"), (canceled, "video_failed")):
        response = remix(client, video_id, prompt="covid-convex")
        assert (response.status_code, response.json()["error"]["code"]) == (409, code)
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"prompt": "a cat"}, "prompt", "no label 'a cat'; allowed: regular-convex, covid-convex"),
        ({"prompt": " "}, "prompt", "must not be empty"),
        ({}, "prompt", "is required"),
        ({"prompt": "covid-convex", "seed": "3"}, "seed", "is taken from the video that is remixed; allowed: prompt"),
        ({"prompt": "covid-convex", "size": "32x32"}, "size", "is taken from the video"),
        ({"prompt": "covid-convex", "extra_body": {"seed": 3}}, "seed", "is taken from the video"),
        ({"prompt": "covid-convex", "stepz": "3"}, "stepz", "not a known field"),
    ],
)
def test_remix_refuses_by_name(client: TestClient, fields: dict[str, Any], param: str, part: str) -> None:
    source = complete(client)
    response = remix(client, source, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert part in response.json()["error"]["message"]
    assert [video["id"] for video in client.get("/v1/videos").json()["data"]] == [source]


def test_remix_respects_the_length_of_the_queue(client: TestClient) -> None:
    source = complete(client)
    for _ in range(5):
        create(client)
    response = remix(client, source, prompt="covid-convex")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["x-should-retry"] == "true"


def test_there_are_no_characters(client: TestClient) -> None:
    files = {"video": ("a.mp4", b"0" * 100_000)}
    response = client.post("/v1/videos/characters", data={"prompt": "x"}, files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "characters_not_supported")
    assert "the served checkpoints (tiny) have no characters" in response.json()["error"]["message"]
    response = client.get("/v1/videos/characters/char_1")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "character_not_found")


def test_who_deletes_while_paging_still_gets_to_the_end(client: TestClient) -> None:
    ids = [create(client) for _ in range(5)]
    seen: list[str] = []
    after = None
    while True:
        page = client.get("/v1/videos", params={"limit": 2, **({"after": after} if after else {})}).json()
        seen += [video["id"] for video in page["data"]]
        for video in page["data"]:
            client.delete(f"/v1/videos/{video['id']}")
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == ids[::-1]


def test_canceled_jobs_are_listed_as_failed(client: TestClient) -> None:
    job_id = create(client)
    services_of(client).jobs.cancel("default", job_id)
    (video,) = client.get("/v1/videos").json()["data"]
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    assert client.get(f"/v1/videos/{job_id}").headers["openai-poll-after-ms"] == "200"


def test_delete_removes_the_file(client: TestClient) -> None:
    job_id = complete(client)
    assert list(services_of(client).store.files()) != []
    response = client.delete(f"/v1/videos/{job_id}")
    assert response.json() == {"id": job_id, "object": "video.deleted", "deleted": True}
    assert list(services_of(client).store.files()) == []
    assert client.get(f"/v1/videos/{job_id}").status_code == 404
    assert client.get(f"/v1/videos/{job_id}/content").status_code == 404
    assert client.delete(f"/v1/videos/{job_id}").status_code == 404


def test_delete_cancels_a_waiting_job(client: TestClient) -> None:
    job_id = create(client)
    assert client.delete(f"/v1/videos/{job_id}").status_code == 200
    assert client.get(f"/v1/videos/{job_id}").status_code == 404
    assert services_of(client).repository.claim(job_id, worker="w") is None


def test_delete_asks_the_worker_of_a_running_job_to_stop(client: TestClient) -> None:
    job_id = create(client)
    repository = services_of(client).repository
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    assert client.delete(f"/v1/videos/{job_id}").status_code == 200
    assert client.get(f"/v1/videos/{job_id}").status_code == 404
    assert repository.renew(job_id, claim.token, steps_done=1) is True


def test_models_tell_labels_and_limits(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    (model,) = listed["data"]
    assert model == client.get("/v1/models/tiny").json()
    assert (model["id"], model["object"], model["is_default"]) == ("tiny", "model", True)
    assert [label["name"] for label in model["labels"]] == ["regular-convex", "covid-convex"]
    assert model["labels"][1]["synonyms"] == ["covid lung"]
    assert model["limits"] == {
        "sizes": ["32x32"],
        "seconds": ["2"],
        "num_frames": [16],
        "fps": 8.0,
        "num_inference_steps": {"minimum": 1, "default": 4, "maximum": 1000},
        "guidance_scale": {"minimum": 1.0, "default": 1.0, "maximum": 10.0},
        "samplers": ["euler", "heun"],
        "shortcut": None,
        "clean_prefixes": False,
        "max_frames": 16,
        "max_seconds": "2",
    }


def test_unknown_model(client: TestClient) -> None:
    response = client.get("/v1/models/sora-2")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "known: tiny" in response.json()["error"]["message"]


def test_health(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    response = client.get("/health/ready")
    assert response.status_code == 503
    checks = response.json()["checks"]
    assert checks["database"] == {"status": "ok"}
    assert checks["disk"] == {"status": "ok"}
    assert "does not answer" in checks["broker"]["reason"]
    assert checks["worker"]["reason"] == "No worker is alive (yet)."
    assert response.json()["error"]["code"] == "not_ready"


def test_worker_that_cannot_load_its_model_is_not_ready(client: TestClient) -> None:
    workers = services_of(client).workers
    workers.report("w", models=(), device="cpu", rss_bytes=1, problem="weights are damaged")
    assert client.get("/health/ready").json()["checks"]["worker"]["reason"] == "weights are damaged"
    workers.report("v", models=("tiny",), device="cpu", rss_bytes=1, problem=None)
    assert client.get("/health/ready").json()["checks"]["worker"] == {"status": "ok"}


def test_metrics_tell_what_a_warm_up_took(client: TestClient) -> None:
    seconds = {"tiny": {"1": 61.5, "8": 7.0}}
    services_of(client).workers.report(
        "w", models=("tiny",), device="cpu", rss_bytes=1, problem=None, warm_up_s=seconds
    )
    text = client.get("/metrics").text
    assert 'medsora_worker_warm_up_seconds{batch_size="1",model="tiny",worker="w"} 61.5' in text
    assert 'medsora_worker_warm_up_seconds{batch_size="8",model="tiny",worker="w"} 7.0' in text


def test_readiness_does_not_tell_where_the_broker_lies(settings: Settings, tmp_path: Path) -> None:
    lost = settings.model_copy(update={"redis_url": SecretStr(f"redis+socket://{tmp_path}/redis.sock")})
    with TestClient(create_app(lost)) as client:
        answer = client.get("/health/ready")
    assert "redis.sock" in answer.json()["checks"]["broker"]["reason"]
    assert str(tmp_path) not in answer.text


def test_readiness_names_a_full_disk(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"min_free_bytes": 2**62}))) as client:
        assert "bytes are free" in client.get("/health/ready").json()["checks"]["disk"]["reason"]


def test_metrics_count_jobs_and_requests(client: TestClient) -> None:
    deleted = complete(client)
    client.delete(f"/v1/videos/{deleted}")
    complete(client)
    create(client)
    text = client.get("/metrics").text
    for line in (
        'medsora_num_requests_waiting{model="tiny"} 1.0',
        'medsora_num_requests_running{model="tiny"} 0.0',
        'medsora_requests_total{model="tiny",status="succeeded"} 2.0',
        'medsora_frames_generated_total{model="tiny"} 32.0',
        'medsora_video_seconds_generated_total{model="tiny"} 4.0',
        'medsora_stage_latency_seconds_sum{model="tiny",stage="sample"} 1.0',
        'medsora_http_request_seconds_count{method="POST",route="/v1/videos",status="200"} 3.0',
        'medsora_http_request_seconds_count{method="DELETE",route="/v1/videos/{video_id}",status="200"} 1.0',
    ):
        assert line in text, line
    assert deleted not in text, "ids must not become labels"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/videos/", 404, None),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("POST", "/health/live", 405, "method_not_allowed"),
    ],
)
def test_errors_of_the_framework_have_the_envelope(
    client: TestClient, method: str, path: str, status: int, code: str | None
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert code is None or response.json()["error"]["code"] == code
    assert response.headers["x-request-id"].startswith("req_")


def test_client_that_goes_away_is_no_error_of_the_server(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    messages = iter([{"type": "http.request", "body": b'{"prompt": ', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there to be answered: {message}")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/videos",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "app": client.app,
    }
    with caplog.at_level("INFO"):
        anyio.run(client.app, scope, receive, send)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == []
    assert "the client went away" in caplog.text
    line = 'medsora_http_request_seconds_count{method="POST",route="/v1/videos",status="499"} 1.0'
    assert line in client.get("/metrics").text
    assert client.get("/v1/videos").json()["data"] == []


def test_wrong_method_tells_the_right_ones(client: TestClient) -> None:
    allowed = client.put("/v1/videos").headers["allow"]
    assert {method.strip() for method in allowed.split(",")} >= {"GET", "POST"}


def test_bug_becomes_a_500_with_an_id(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(services_of(client).repository, "get", broken)
    response = client.get(f"/v1/videos/{UNKNOWN}")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret detail" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"] in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


def test_locked_database_is_told_as_503(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.jobs.database.BUSY_TIMEOUT_MS", 100)
    with TestClient(create_app(settings)) as client:
        lock = sqlite3.connect(settings.data_dir / "medsora.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        try:
            response = client.post("/v1/videos", json={"prompt": "covid-convex"})
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "database_unavailable"
        assert "retry-after" in response.headers
        assert client.post("/v1/videos", json={"prompt": "covid-convex"}).status_code == 200
        assert len(client.get("/v1/videos").json()["data"]) == 1


def test_a_database_that_cannot_be_written_is_told_as_503_and_still_read(client: TestClient) -> None:
    """As on a disk that was mounted read-only."""
    made = create(client)
    engine = services_of(client).database.engine

    @event.listens_for(engine, "begin")
    def forbid(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only=ON")

    refused = client.post("/v1/videos", json={"prompt": "covid-convex"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
    assert "retry-after" in refused.headers
    assert client.delete(f"/v1/videos/{made}").status_code == 503
    assert client.get(f"/v1/videos/{made}").status_code == 200
    event.remove(engine, "begin", forbid)

    @event.listens_for(engine, "begin")
    def allow(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only=OFF")

    assert client.post("/v1/videos", json={"prompt": "covid-convex"}).status_code == 200
    assert len(client.get("/v1/videos").json()["data"]) == 2


def test_openapi_describes_both_bodies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/videos", "/v1/videos/{video_id}/remix"):
        assert set(paths[path]["post"]["requestBody"]["content"]) == {"multipart/form-data", "application/json"}


def test_http_process_does_not_load_torch() -> None:
    code = "import sys, server.app, server.reaper, server.embedded; sys.exit(bool({'torch', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_videos_of_another_tenant_do_not_exist(client: TestClient) -> None:
    mine, deleted = complete(client), create(client)
    assert client.delete(f"/v1/videos/{deleted}").status_code == 200
    someone = Caller(tenant="another", key_id=None, scopes=ALL_SCOPES)
    client.app.dependency_overrides[get_caller] = lambda: someone  # type: ignore[attr-defined]
    for method, path in (("GET", ""), ("GET", "/content"), ("HEAD", "/content"), ("DELETE", ""), ("POST", "/remix")):
        body = {"json": {"prompt": "covid-convex"}} if method == "POST" else {}
        answer = client.request(method, f"/v1/videos/{mine}{path}", **body)
        assert answer.status_code == 404, (method, path)
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "video_not_found"
    for cursor in (mine, deleted):
        answer = client.get("/v1/videos", params={"after": cursor})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")
    assert client.get("/v1/videos").json()["data"] == []
    theirs = create(client)
    assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [theirs]
    with pytest.raises(NotFoundError):
        services_of(client).jobs.cancel("another", mine)
    client.app.dependency_overrides.clear()  # type: ignore[attr-defined]
    assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [mine]
    assert client.get(f"/v1/videos/{mine}").json()["status"] == "completed"
    assert client.get("/v1/videos", params={"after": deleted}).status_code == 200
