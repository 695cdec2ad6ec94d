"""/v1/files: what is taken, streamed to disk, listed, sent back and removed."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import update

from server.api import uploads
from server.app import create_app
from server.files.model import File
from server.files.store import FileStore
from server.jobs.database import Database, database_now
from server.settings import Settings

LINES = b'{"custom_id": "a"}\n' * 3


@pytest.fixture
def upload(client: TestClient) -> Callable[..., Any]:
    """Upload a file; returns the answer."""

    def send(content: bytes = LINES, *, name: str = "lines.jsonl", **fields: str) -> Any:
        return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **fields})

    return send


@pytest.fixture
def change_file(settings: Settings) -> Callable[..., None]:
    """Change columns of a file in the application's database."""

    def change(file_id: str, **values: Any) -> None:
        database = Database(settings.database_address)
        with database.write() as connection:
            connection.execute(update(File).where(File.id == file_id).values(**values))
        database.close()

    return change


def stored(settings: Settings) -> list[str]:
    """Names of all files on disk, partial ones included."""
    return [path.name for path in settings.files_dir.rglob("*") if path.is_file()]


def test_a_file_comes_back_as_it_was_sent(client: TestClient, upload: Callable[..., Any], settings: Settings) -> None:
    content = bytes(range(256)) * 5000  # binary, and more than one piece
    made = upload(content).json()
    assert made == {
        "id": made["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": made["created_at"],
        "expires_at": None,
        "filename": "lines.jsonl",
        "purpose": "batch",
        "status": "processed",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert client.get(f"/v1/files/{made['id']}").json() == made
    answer = client.get(f"/v1/files/{made['id']}/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/jsonl"
    part = client.get(f"/v1/files/{made['id']}/content", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert stored(settings) == [made["id"]]


@pytest.mark.parametrize(("asked", "status"), [("bytes=-1", 200), ("bytes=0-", 416), ("bytes=-0", 416)])
def test_an_empty_file_has_last_bytes_but_no_first(
    client: TestClient, upload: Callable[..., Any], asked: str, status: int
) -> None:
    """RFC 9110, 14.1.2: a range of the last bytes can be satisfied unless it is of none."""
    answer = client.get(f"/v1/files/{upload(b'').json()['id']}/content", headers={"range": asked})
    assert answer.status_code == status
    if status == 200:
        assert answer.content == b""
    else:
        assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_parts_may_come_in_any_order(client: TestClient) -> None:
    files = {"file": ("a.jsonl", LINES), "purpose": (None, b"batch")}
    assert client.post("/v1/files", files=files).json()["purpose"] == "batch"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"purpose": "fine-tune"}, "purpose", "allowed: batch"),
        ({"mode": "x"}, "mode", "is not a known field; allowed: file, purpose"),
        ({"expires_after[seconds]": "7200"}, "expires_after.anchor", "is required"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "expires_after", "3600"),
        ({"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "7200"}, "expires_after", "created_at"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "x" * 2000}, None, "more than 1024 bytes"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    upload: Callable[..., Any], settings: Settings, fields: dict[str, str], param: str | None, message: str
) -> None:
    answer = upload(**fields)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert param is None or error["param"] == param
    assert stored(settings) == []


def test_parts_that_are_missing_or_of_the_wrong_kind(client: TestClient, settings: Settings) -> None:
    bodies: list[tuple[Any, str]] = [
        ({"files": {"file": ("a", LINES)}}, "purpose: is required"),
        ({"files": {"purpose": (None, b"batch")}}, "file: is required"),
        ({"files": {"file": (None, LINES), "purpose": (None, b"batch")}}, "file: must be a file, got text"),
        ({"files": {"file": ("a", LINES), "purpose": ("p", b"batch")}}, "purpose: must be text, got a file"),
        ({"files": [("file", ("a", LINES)), ("file", ("b", LINES))]}, "file: is given more than once"),
        ({"files": {"file": ("a" * 300, LINES), "purpose": (None, b"batch")}}, "at most 255 printable"),
        ({"content": b"--x\r\n\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "no name"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "ends before"),
        ({"content": b"nothing", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "no valid multipart"),
        (
            {"content": b"", "headers": {"content-type": f"multipart/form-data; boundary={'x' * 500}"}},
            "Boundary length",
        ),
        ({"files": {f"a{number}": (None, b"") for number in range(20)}}, "a0: is not a known field"),
    ]
    for body, message in bodies:
        answer = client.post("/v1/files", **body)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text
    assert client.post("/v1/files", json={}).status_code == 415
    assert stored(settings) == []


def test_the_name_of_a_file_is_its_last_part(upload: Callable[..., Any]) -> None:
    assert upload(name="../../etc/lines.jsonl").json()["filename"] == "lines.jsonl"


def test_files_have_a_limit_of_their_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    small = settings.model_copy(update={"max_file_bytes": 2048, "max_body_bytes": 1024})
    monkeypatch.setattr(uploads, "UPLOAD_OVERHEAD_BYTES", 4096)
    with TestClient(create_app(small)) as client:
        for size, status in ((2048, 200), (2049, 413), (1_000_000, 413)):
            answer = client.post("/v1/files", files={"file": ("a", b"x" * size)}, data={"purpose": "batch"})
            assert answer.status_code == status, answer.text
    assert len(stored(settings)) == 1


def test_a_full_disk_is_said_and_nothing_is_left(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from server.files import store

    def full(path: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with TestClient(create_app(settings)) as client:
        with monkeypatch.context() as patched:
            patched.setattr(store.os, "fsync", full)
            answer = client.post("/v1/files", files={"file": ("a", LINES)}, data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full")
        assert client.get("/v1/files").json()["data"] == []
    assert stored(settings) == []
    with TestClient(create_app(settings.model_copy(update={"min_free_bytes": 2**60}))) as client:
        answer = client.post("/v1/files", files={"file": ("a", LINES)}, data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full")


def test_lists_are_paged(client: TestClient, upload: Callable[..., Any]) -> None:
    ids = [upload().json()["id"] for _ in range(5)]
    seen: list[str] = []
    after = ""
    while True:
        page = client.get("/v1/files", params={"limit": 2, "order": "asc", "after": after}).json()
        seen += [file["id"] for file in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
        client.delete(f"/v1/files/{after}")  # a deleted file is still a cursor
    assert seen == ids
    newest = client.get("/v1/files", params={"limit": 1}).json()
    assert [file["id"] for file in newest["data"]] == [ids[4]]
    assert client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []
    for params, param in (({"after": "file-1"}, "after"), ({"purpose": "evals"}, "purpose"), ({"limit": 0}, "limit")):
        answer = client.get("/v1/files", params=params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_deleted_and_expired_files_are_gone(
    client: TestClient, upload: Callable[..., Any], change_file: Callable[..., None]
) -> None:
    deleted, expired = upload().json()["id"], upload().json()["id"]
    assert client.delete(f"/v1/files/{deleted}").json() == {"id": deleted, "object": "file", "deleted": True}
    change_file(expired, expires_at=database_now() - 1)
    for file_id in (deleted, expired, "file-" + "0" * 32, "x"):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answer = client.request(method, f"/v1/files/{file_id}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")
    assert client.get("/v1/files").json()["data"] == []


def test_life_of_a_file(client: TestClient, upload: Callable[..., Any]) -> None:
    made = upload(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).json()
    assert made["expires_at"] - made["created_at"] == 3600


def test_files_of_another_tenant_do_not_exist(
    client: TestClient, upload: Callable[..., Any], change_file: Callable[..., None]
) -> None:
    file_id = upload().json()["id"]
    change_file(file_id, tenant="another")
    assert client.get("/v1/files").json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert client.request(method, f"/v1/files/{file_id}{path}").status_code == 404
    assert client.get("/v1/files", params={"after": file_id}).status_code == 400
    body = {"input_file_id": file_id, "endpoint": "/v1/videos", "completion_window": "24h"}
    assert client.post("/v1/batches", json=body).json()["error"]["param"] == "input_file_id"


def test_a_writer_that_is_left_leaves_nothing(settings: Settings) -> None:
    store = FileStore(settings.files_dir)
    with store.writer("file-" + "a" * 32) as writer:
        writer.write(b"x" * 100_000)
        assert len(stored(settings)) == 1
    assert stored(settings) == []
    with pytest.raises(ValueError, match="not a file id"):
        store.path("file-../../x")


def test_a_bucket_that_is_down_is_told_as_such(settings: Settings) -> None:
    down = {
        "storage_url": "s3://bucket",
        "s3_endpoint_url": "http://127.0.0.1:1",
        "s3_region": "x",
        "s3_access_key_id": "a",
        "s3_secret_access_key": SecretStr("b"),
        "s3_timeout_s": 0.5,
    }
    with TestClient(create_app(settings.model_copy(update=down))) as client:
        answer = client.post("/v1/files", files={"file": ("a.jsonl", b"{}\n"), "purpose": (None, "batch")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert answer.headers["x-should-retry"] == "true"
        assert "file store does not answer" in client.get("/health/ready").json()["checks"]["disk"]["reason"]
        assert client.post("/v1/videos", json={"prompt": "covid lung"}).status_code == 200, "it waits for the bucket"
