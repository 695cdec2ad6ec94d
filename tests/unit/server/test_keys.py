"""Keys: made once, hashed at rest, told apart; and what they open (F35, F37)."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text, update
from typer.testing import CliRunner

from server.api.access import NEEDS, check_scope, is_loopback
from server.api.dependencies import Caller
from server.app import create_app
from server.cli import app
from server.errors import ForbiddenError
from server.jobs.database import Database, database_now
from server.keys import repository as key_repository
from server.keys.model import ALL_SCOPES, ApiKey, Scope, new_secret, read_secret
from server.keys.repository import KeyRepository, KeyState
from server.settings import Settings

runner = CliRunner()


@pytest.fixture
def keys(database: Database) -> KeyRepository:
    return KeyRepository(database)


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """An application whose callers need keys."""
    with TestClient(create_app(settings.model_copy(update={"keys": "required"}))) as made:
        yield made


def keys_of(client: TestClient) -> KeyRepository:
    found: KeyRepository = client.app.state.services.keys  # type: ignore[attr-defined]
    return found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def new_key(guarded: TestClient) -> Callable[..., str]:
    def make(*scopes: Scope, tenant: str = "a", **options: Any) -> str:
        wanted = frozenset(scopes) or ALL_SCOPES
        return keys_of(guarded).create(tenant=tenant, name="test", scopes=wanted, **options)[1]

    return make


def test_a_key_is_kept_as_a_hash_alone(keys: KeyRepository, database: Database) -> None:
    record, key = keys.create(tenant="a", name="n", scopes=ALL_SCOPES)
    assert re.fullmatch(r"medsora_[0-9a-f]{16}_[0-9a-f]{64}", key)
    secret = key.rpartition("_")[2]
    with database.write() as connection:
        (row,) = connection.execute(text("select * from api_keys")).mappings().all()
        connection.exec_driver_sql("create table dump as select * from api_keys")
    assert row["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert secret not in str(dict(row))
    assert secret not in repr(record) + repr(read_secret(key))
    path = Path(str(database.url.database))
    assert all(secret.encode() not in file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    assert keys.find(key) == record


def test_keys_differ() -> None:
    assert len({new_secret().text for _ in range(1000)}) == 1000


def test_a_key_is_found_only_whole(keys: KeyRepository) -> None:
    _, key = keys.create(tenant="a", name="n", scopes=ALL_SCOPES)
    _, other = keys.create(tenant="b", name="n", scopes=ALL_SCOPES)
    head, _, tail = key.rpartition("_")
    wrong = [
        "",
        key.upper(),
        key[:-1],
        f"{key} ",
        f"{head}_{'0' * 64}",
        f"{head}_{other.rpartition('_')[2]}",
        f"medsora_{'0' * 16}_{tail}",
        tail,
        "\u00e9" * 10,
    ]
    for text_ in wrong:
        assert keys.find(text_) is None, text_


def test_keys_are_compared_in_constant_time(keys: KeyRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = keys.create(tenant="a", name="n", scopes=ALL_SCOPES)
    compared = []
    real = key_repository.hmac.compare_digest
    monkeypatch.setattr(
        key_repository.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b)
    )
    for candidate in (key, key[:-1] + "x", new_secret().text, "nothing"):
        keys.find(candidate)
    assert compared == [(64, 64)] * 4


def test_life_of_a_key_is_of_the_database_clock(keys: KeyRepository, database: Database) -> None:
    record, key = keys.create(tenant="a", name="n", scopes=ALL_SCOPES, expires_after_s=3600)
    assert record.expires_at is not None
    assert record.expires_at - record.created_at == pytest.approx(3600, abs=0.1)
    assert record.state is KeyState.ACTIVE
    with database.write() as connection:
        connection.execute(update(ApiKey).values(expires_at=database_now() - 0.001))
    found = keys.find(key)
    assert found is not None
    assert found.state is KeyState.EXPIRED
    revoked = keys.revoke(record.id)
    assert revoked is not None
    assert revoked.state is KeyState.REVOKED
    again = keys.revoke(record.id)
    assert again is not None
    assert again.revoked_at == revoked.revoked_at
    assert keys.revoke("key_unknown") is None
    assert keys.any_exists()


# -- F35 -----------------------------------------------------------------------------------------------------


def test_without_a_good_key_there_is_nothing(guarded: TestClient, new_key: Callable[..., str]) -> None:
    good, expired, revoked = new_key(), new_key(), new_key()
    keys = keys_of(guarded)
    services = guarded.app.state.services  # type: ignore[attr-defined]
    with services.database.write() as connection:
        expired_id = read_secret(expired).key_id  # type: ignore[union-attr]
        connection.execute(update(ApiKey).where(ApiKey.id == expired_id).values(expires_at=database_now() - 1))
    keys.revoke(read_secret(revoked).key_id)  # type: ignore[union-attr]
    cases: list[tuple[dict[str, str], str, str]] = [
        ({}, "", "missing_api_key"),
        ({}, f"?api_key={good}&key={good}", "missing_api_key"),
        ({"x-api-key": good}, "", "missing_api_key"),
        ({"authorization": good}, "", "missing_api_key"),
        ({"authorization": f"Basic {good}"}, "", "missing_api_key"),
        ({"authorization": "Bearer "}, "", "missing_api_key"),
        (bearer(good.upper()), "", "invalid_api_key"),
        (bearer(good[:-1] + ("0" if good[-1] != "0" else "1")), "", "invalid_api_key"),
        (bearer("any"), "", "invalid_api_key"),
        (bearer(expired), "", "invalid_api_key"),
        (bearer(revoked), "", "invalid_api_key"),
    ]
    for headers, query, code in cases:
        for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models")):
            answer = guarded.request(method, path + query, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code), (headers, method)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert good not in answer.text
    assert "is expired" in guarded.get("/v1/videos", headers=bearer(expired)).text
    for scheme in ("Bearer", "bearer"):
        assert guarded.get("/v1/videos", headers={"authorization": f"{scheme} {good}"}).status_code == 200
    for path in ("/health/live", "/metrics", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_revoking_holds_at_once_in_other_processes(guarded: TestClient, settings: Settings) -> None:
    elsewhere = Database(settings.database_address)
    record, key = KeyRepository(elsewhere).create(tenant="a", name="n", scopes=ALL_SCOPES)
    assert guarded.get("/v1/videos", headers=bearer(key)).status_code == 200
    KeyRepository(elsewhere).revoke(record.id)
    assert guarded.get("/v1/videos", headers=bearer(key)).status_code == 401
    elsewhere.close()


def test_every_route_under_v1_wants_a_key(guarded: TestClient) -> None:
    paths = guarded.get("/openapi.json").json()["paths"]
    checked = 0
    for path, operations in paths.items():
        for method, operation in operations.items():
            answer = guarded.request(method, re.sub(r"\{[^}]*\}", "x", path))
            if path.startswith("/v1/"):
                assert (answer.status_code, method, path) == (401, method, path)
                assert operation["security"]
                checked += 1
            else:
                assert answer.status_code != 401
                assert "security" not in operation
    assert checked > 15
    assert {path.split("/")[2] for path in paths if path.startswith("/v1/")} <= set(NEEDS)


@pytest.mark.parametrize("path", ["/v1/videos/edits", "/v1/videos/characters", "/v1/videos/characters/x"])
def test_routes_that_no_document_tells_of_want_a_key_too(guarded: TestClient, path: str) -> None:
    assert guarded.post(path).status_code in (401, 405)
    assert guarded.get(path).status_code == 401


# -- where no key is needed ------------------------------------------------------------------------------------


def test_loopback_needs_no_key_until_there_is_one(client: TestClient) -> None:
    for headers in ({}, bearer("any"), {"authorization": "nonsense"}):
        assert client.get("/v1/videos", headers=headers).status_code == 200
    record, key = keys_of(client).create(tenant="default", name="n", scopes=ALL_SCOPES)
    assert client.get("/v1/videos").status_code == 401
    assert client.get("/v1/videos", headers=bearer(key)).status_code == 200
    keys_of(client).revoke(record.id)
    assert client.get("/v1/videos").status_code == 401, "revoking the last key must not open the server"


def test_elsewhere_a_key_is_needed_from_the_start(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(settings.model_copy(update={"host": "0.0.0.0"}))) as client:
        answer = client.get("/v1/videos")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")
        assert "medsora-server keys create" in answer.json()["error"]["message"]
    assert "there is none yet" in caplog.text


def test_behind_a_gateway_keys_can_be_switched_off(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"host": "0.0.0.0", "keys": "off"}))) as client:
        keys_of(client).create(tenant="a", name="n", scopes=ALL_SCOPES)
        page = {"origin": "https://gateway.example", "host": "gateway.example"}
        for headers in (bearer("any"), page):
            assert client.get("/v1/videos", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_pages_of_other_sites_get_nothing_without_a_key(client: TestClient) -> None:
    """F39, and forged requests: a form on any page can post to 127.0.0.1."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://localhost.evil.example"):
        answer = client.post("/v1/videos", data={"prompt": "covid-convex"}, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key"), origin
        assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = client.options("/v1/videos", headers={"origin": origin, "access-control-request-method": "POST"})
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", "[", ""):
        answer = client.get("/v1/videos", headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key"), host
    assert client.get("/v1/videos").json()["data"] == []
    for origin in ("http://127.0.0.1:8000", "http://localhost:3000", "http://[::1]:8000"):
        assert client.get("/v1/videos", headers={"origin": origin}).status_code == 200
        assert client.get("/v1/videos", headers={"host": origin.removeprefix("http://")}).status_code == 200


# -- F37 -----------------------------------------------------------------------------------------------------


def test_a_key_opens_what_its_scopes_say(guarded: TestClient, new_key: Callable[..., str]) -> None:
    reader, writer = new_key(Scope.VIDEOS_READ), new_key(Scope.VIDEOS_WRITE)
    batcher = new_key(Scope.BATCHES)
    body = {"prompt": "covid-convex"}
    refused = guarded.post("/v1/videos", json=body, headers=bearer(reader))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert "videos:write" in refused.json()["error"]["message"]
    made = guarded.post("/v1/videos", json=body, headers=bearer(writer))
    assert made.status_code == 200
    path = f"/v1/videos/{made.json()['id']}"
    assert guarded.get(path, headers=bearer(reader)).status_code == 200
    assert guarded.get(path, headers=bearer(writer)).status_code == 403
    assert guarded.delete(path, headers=bearer(reader)).status_code == 403
    assert guarded.get(path, headers=bearer(batcher)).status_code == 403
    assert guarded.get("/v1/files", headers=bearer(batcher)).status_code == 200
    assert guarded.get("/v1/batches", headers=bearer(reader)).status_code == 403
    for key in (reader, writer, batcher):
        assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    assert guarded.delete(path, headers=bearer(writer)).status_code == 200


def test_a_path_that_the_table_does_not_know_is_open_to_full_keys_alone() -> None:
    some = Caller(tenant="a", key_id="key_1", scopes=frozenset({Scope.VIDEOS_READ}))
    with pytest.raises(ForbiddenError, match="all scopes"):
        check_scope(some, "GET", "/v1/unheard-of")
    check_scope(Caller(tenant="a", key_id="key_1", scopes=ALL_SCOPES), "GET", "/v1/unheard-of")


@pytest.mark.parametrize("field", ["tenant", "owner", "status", "id", "key_id", "attempt", "artifact"])
def test_nobody_can_set_what_is_not_theirs_to_set(guarded: TestClient, new_key: Callable[..., str], field: str) -> None:
    key = new_key()
    for how in ("json", "data"):
        answer = guarded.post("/v1/videos", headers=bearer(key), **{how: {"prompt": "covid-convex", field: "b"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert guarded.get("/v1/videos", headers=bearer(key)).json()["data"] == []


# -- the command line ------------------------------------------------------------------------------------------


def run(settings: Settings, *words: str) -> Any:
    return runner.invoke(app, ["keys", *words, "--data-dir", str(settings.data_dir)])


def test_keys_from_the_command_line(guarded: TestClient, settings: Settings) -> None:
    made = run(settings, "create", "--name", "laptop", "--tenant", "lab", "--scope", "videos:read", "--expires", "2d")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert read_secret(key) is not None, "standard output is the key alone"
    assert "tenant lab" in made.stderr
    assert key not in made.stderr
    assert guarded.get("/v1/videos", headers=bearer(key)).status_code == 200
    (row,) = [line for line in run(settings, "list").stdout.splitlines() if "laptop" in line]
    key_id = read_secret(key).key_id  # type: ignore[union-attr]
    assert row.split()[:3] == [key_id, "lab", "active"]
    assert "videos:read" in row
    assert key.rpartition("_")[2] not in run(settings, "list").output
    assert "laptop" not in run(settings, "list", "--tenant", "other").output
    revoked = run(settings, "revoke", key_id)
    assert (revoked.exit_code, revoked.stdout) == (0, f"{key_id} of tenant lab is revoked.\n")
    assert guarded.get("/v1/videos", headers=bearer(key)).status_code == 401
    assert "revoked" in run(settings, "list").stdout
    full = run(settings, "create", "--name", "all").stdout.strip()
    record = keys_of(guarded).find(full)
    assert record is not None
    assert (record.tenant, record.scopes, record.expires_at) == ("default", ALL_SCOPES, None)
    assert record.created_at == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("create", "--name", "n", "--tenant", "A b"), "--tenant: 'A b' does not do; allowed"),
        (("create", "--name", " "), "--name: must be"),
        (("create", "--name", "n", "--scope", "video"), "--scope: there is no 'video'; allowed: videos:read"),
        (("create", "--name", "n", "--expires", "1y"), "--expires: '1y' does not do; allowed"),
        (("create", "--name", "n", "--expires", "0d"), "--expires: '0d' does not do; allowed"),
        (("revoke", "key_1"), "there is no key 'key_1'"),
    ],
)
def test_wrong_words_are_told(settings: Settings, words: tuple[str, ...], told: str) -> None:
    result = run(settings, *words)
    assert result.exit_code == 2
    assert told in result.output
    assert run(settings, "list").stdout.splitlines()[1:] == []
