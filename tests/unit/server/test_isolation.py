"""Nobody sees another's objects (F36): every operation of the OpenAPI document, tried by another tenant.

A new kind of object makes these tests fail until it is in :data:`MAKERS`; so does a body that names an object by a
field that :data:`REFERENCES` does not know.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from medsora.checkpoint import write_tiny_checkpoint
from server.api.dependencies import Services
from server.app import create_app
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.jobs.model import Base
from server.jobs.repository import FinishedWork
from server.keys.model import ALL_SCOPES
from server.settings import Settings
from server.storage import Variant

METHODS = ("get", "post", "put", "patch", "delete")
SHARED = {"model_id"}
"""Path parameters that name what belongs to nobody."""


class Tenant:
    """A client with the key of a tenant."""

    def __init__(self, client: TestClient, name: str) -> None:
        self.client, self.name = client, name
        self.services: Services = client.app.state.services  # type: ignore[attr-defined]
        _, key = self.services.keys.create(tenant=name, name="n", scopes=ALL_SCOPES)
        self._headers = {"authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> Any:
        return self.client.request(method, path, headers={**self._headers, **(headers or {})}, **options)

    def make(self, path: str, **options: Any) -> str:
        answer = self.ask("POST", path, **options)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


def make_video(tenant: Tenant) -> str:
    """A video that is finished, files and all."""
    video = tenant.make("/v1/videos", json={"prompt": "covid-convex"})
    services = tenant.services
    claim = services.repository.claim(video, worker="w")
    assert claim is not None
    stored = {
        variant: services.store.write(
            video, claim.token, lambda path: path.write_bytes(b"0123456789") and None, Path.stat, variant=variant
        )
        for variant in Variant
    }
    work = FinishedWork(
        artifact=stored[Variant.VIDEO].name,
        size_bytes=10,
        sha256=stored[Variant.VIDEO].sha256,
        thumbnail_sha256=stored[Variant.THUMBNAIL].sha256,
        spritesheet_sha256=stored[Variant.SPRITESHEET].sha256,
        sampling_s=1.0,
        encode_s=1.0,
        store_s=1.0,
    )
    assert services.repository.succeed(video, claim.token, work)
    return video


def make_file(tenant: Tenant) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": {"prompt": "covid-convex"}}
    files = {"file": ("a.jsonl", json.dumps(line).encode())}
    return tenant.make("/v1/files", data={"purpose": "batch"}, files=files)


def make_batch(tenant: Tenant) -> str:
    order = {"input_file_id": make_file(tenant), "endpoint": "/v1/videos", "completion_window": "24h"}
    return tenant.make("/v1/batches", json=order)


def make_dataset(tenant: Tenant) -> str:
    """A dataset of which one clip is done."""
    made = tenant.make("/v1/datasets", json={"name": "d", "labels": {"covid-convex": 2}})
    services = tenant.services
    datasets = DatasetRepository(services.database, lease_s=60.0)
    dataset = datasets.get(tenant.name, made)
    assert dataset is not None
    held = datasets.claim(dataset.seq)
    assert held is not None
    (job_id,) = datasets.submit(held, limit=1)
    claim = services.repository.claim(job_id, worker="w")
    order = datasets.orders_of([job_id])[job_id]
    assert claim is not None
    files = DatasetFiles(services.settings.datasets_dir)
    files.write(made, job_id, claim.token, lambda path: path.write_bytes(b"0123456789"))
    part = {"name": ".mp4", "size_bytes": 10, "crc32": 0xA684C7C6, "sha256": "0" * 64}
    values = {"job_id": job_id, "attempt": claim.token, "size_bytes": 10, "parts": [part], "measures": {}}
    datasets.add_payload(order, {**values, "frames_sha256": "0" * 64, "fingerprint": b""}, compare=None)
    work = FinishedWork(artifact="x", size_bytes=1, sha256="0" * 64, sampling_s=1.0, encode_s=1.0, store_s=1.0)
    assert services.repository.succeed(job_id, claim.token, work)
    assert datasets.settle(held, limit=5) == 1
    datasets.release(held)
    return made


def make_webhook(tenant: Tenant) -> str:
    return tenant.make("/v1/webhooks", json={"url": "https://example.com/"})


MAKERS: dict[str, Callable[[Tenant], str]] = {
    "video_id": make_video,
    "file_id": make_file,
    "batch_id": make_batch,
    "webhook_id": make_webhook,
    "dataset_id": make_dataset,
}
"""Path parameter -> how such an object is made."""

BODIES: dict[str, dict[str, Any]] = {
    "/v1/videos/{video_id}/remix": {"prompt": "regular-convex"},
}
"""Path -> a body that is right, where one is needed: it must be the object that is missing, and nothing else."""

PROMPT = {"prompt": "covid-convex"}
REFERENCES: dict[tuple[str, str], tuple[str, Callable[[str], dict[str, Any]]]] = {
    ("/v1/batches", "input_file_id"): (
        "file_id",
        lambda made: {"input_file_id": made, "endpoint": "/v1/videos", "completion_window": "24h"},
    ),
    ("/v1/videos", "file_id"): ("file_id", lambda made: {**PROMPT, "input_reference": {"file_id": made}}),
    ("/v1/videos/edits", "id"): ("video_id", lambda made: {**PROMPT, "video": {"id": made}}),
    ("/v1/videos/edits", "video_id"): ("video_id", lambda made: {**PROMPT, "video_id": made}),
    ("/v1/videos/extensions", "id"): ("video_id", lambda made: {**PROMPT, "video": {"id": made}, "seconds": "2"}),
    ("/v1/videos/extensions", "video_id"): ("video_id", lambda made: {**PROMPT, "video_id": made, "seconds": "2"}),
}
"""Path and field that names an object in a body -> what kind of object, and such a body."""


@pytest.fixture(scope="module")
def able_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that can begin with given frames: else what is named would be refused unseen."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("able") / "tiny", max_frames=64)


@pytest.fixture
def tenants(settings: Settings, able_checkpoint: Path) -> Iterator[tuple[Tenant, Tenant]]:
    changes = {"keys": "required", "max_queued_jobs": 1000, "checkpoints": (str(able_checkpoint),)}
    settings = settings.model_copy(update=changes)
    with TestClient(create_app(settings)) as client:
        yield Tenant(client, "a"), Tenant(client, "b")


@pytest.fixture
def document(tenants: tuple[Tenant, Tenant]) -> dict[str, Any]:
    found: dict[str, Any] = tenants[0].client.get("/openapi.json").json()
    return found


def parameters_of(path: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", path)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield method, path, methods[method]


def is_stream(operation: dict[str, Any]) -> bool:
    return any(
        "event-stream" in kind for answer in operation["responses"].values() for kind in answer.get("content", {})
    )


def census(services: Services) -> dict[str, int]:
    """Number of rows of every table, but for the figures of requests, which are written every few seconds."""
    with services.database.read() as connection:
        return {
            table.name: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
            if table.name != "measure_sums"
        }


def owner_sees(owner: Tenant, objects: dict[str, str], document: dict[str, Any]) -> list[Any]:
    """The objects as they are."""
    seen = []
    for name, made in objects.items():
        path = next(one for one in document["paths"] if one.endswith(f"/{{{name}}}"))
        answer = owner.ask("GET", path.format_map({name: made}))
        assert answer.status_code == 200, path
        seen.append(answer.json())
    return seen


def test_every_operation_with_an_id_is_blind_to_others(
    tenants: tuple[Tenant, Tenant], document: dict[str, Any]
) -> None:
    owner, stranger = tenants
    tried = 0
    for method, path, _ in operations(document):
        names = [name for name in parameters_of(path) if name not in SHARED]
        if not names:
            continue
        assert set(names) <= set(MAKERS), f"say in MAKERS how what {path} names is made"
        objects = {name: MAKERS[name](owner) for name in names}
        body = {"json": BODIES.get(path, {})} if method in ("post", "put", "patch") else {}
        theirs = path.format_map(objects)
        unknown = path.format_map({name: re.sub(r"[0-9a-f]{32}", "0" * 32, one) for name, one in objects.items()})
        before, as_it_was = census(owner.services), owner_sees(owner, objects, document)
        seen = {}
        for headers in ({}, {"idempotency-key": f"{method}{path}"}):
            for what, url in (("theirs", theirs), ("unknown", unknown)):
                for one_method in (method.upper(), *(["HEAD"] if method == "get" else [])):
                    answer = stranger.ask(one_method, url, headers=headers, **body)
                    if one_method == "HEAD" and answer.status_code == 405:
                        continue
                    assert answer.status_code == 404, (one_method, url, answer.text)
                    seen[what] = answer.text
                    tried += 1
        for made in objects.values():
            seen["theirs"] = seen["theirs"].replace(made, "ID")
        assert seen["theirs"] == re.sub(r"[a-z]+[-_]0{32}", "ID", seen["unknown"]), "it tells that it is there"
        after = census(owner.services)
        assert after == before, (method, path)
        assert owner_sees(owner, objects, document) == as_it_was, (method, path)
    assert tried >= 30


def test_what_is_tried_works_for_its_owner(tenants: tuple[Tenant, Tenant], document: dict[str, Any]) -> None:
    """Else a wrong path or body would look like blindness."""
    owner, _ = tenants
    for method, path, operation in operations(document):
        names = [name for name in parameters_of(path) if name not in SHARED]
        if not names:
            continue
        url = path.format_map({name: MAKERS[name](owner) for name in names})
        body = {"json": BODIES.get(path, {})} if method in ("post", "put", "patch") else {}
        answer = owner.ask(method.upper(), url, **body)
        assert answer.status_code in (200, 204), (method, path, answer.text)
        assert operation["operationId"]


def test_lists_hold_ones_own_alone(tenants: tuple[Tenant, Tenant], document: dict[str, Any]) -> None:
    owner, stranger = tenants
    ids = [make(owner) for make in MAKERS.values()]
    tried = set()
    for method, path, operation in operations(document):
        if method != "get" or parameters_of(path) or is_stream(operation) or not path.startswith("/v1/"):
            continue
        answer = stranger.ask("GET", path)
        assert answer.status_code == 200, path
        assert not [one for one in ids if one in answer.text], path
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "after":
                for cursor in ids:
                    answer = stranger.ask("GET", path, params={"after": cursor})
                    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor"), path
        tried.add(path)
    assert {"/v1/videos", "/v1/files", "/v1/batches"} <= tried
    assert stranger.ask("GET", "/v1/usage").json()["clips_per_day"]["used"] == 0


def references(schema: Any) -> Iterator[str]:
    """Names of fields, at any depth, that could name an object."""
    if isinstance(schema, dict):
        for name, part in schema.get("properties", {}).items():
            if name == "id" or name.endswith(("_id", "_ids")):
                yield name
            yield from references(part)
        for key in ("items", "anyOf", "oneOf", "allOf"):
            yield from references(schema.get(key))
    elif isinstance(schema, list):
        for part in schema:
            yield from references(part)


def test_bodies_name_ones_own_alone(tenants: tuple[Tenant, Tenant], document: dict[str, Any]) -> None:
    owner, stranger = tenants
    for method, path, operation in operations(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for field in set(references(content["schema"])) - {"custom_id"}:
                assert (path, field) in REFERENCES, f"say in REFERENCES what {field} of {path} names"
                kind, body = REFERENCES[path, field]
                made = MAKERS[kind](owner)
                unknown = re.sub(r"[0-9a-f]{32}", "0" * 32, made)
                answers = [stranger.ask(method.upper(), path, json=body(named)) for named in (made, unknown)]
                assert {answer.status_code for answer in answers} <= {400, 404}, path
                told = [answer.text.replace(made, "ID").replace(unknown, "ID") for answer in answers]
                assert told[0] == told[1], f"{path} tells that it is there"
                of_owner = owner.ask(method.upper(), path, json=body(made))
                assert of_owner.text.replace(made, "ID") != told[0], f"{path} does not find what is the caller's own"


def test_keys_of_idempotency_lead_to_ones_own_alone(tenants: tuple[Tenant, Tenant]) -> None:
    owner, stranger = tenants
    order = {"headers": {"idempotency-key": "k"}, "json": {"prompt": "covid-convex"}}
    video = owner.make("/v1/videos", **order)
    assert stranger.make("/v1/videos", **order) != video
