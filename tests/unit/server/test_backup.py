"""Backups hold one moment, are checked against what is known, and can be put back where nothing is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from postgres_cluster import PostgresCluster
from pydantic import SecretStr
from s3_server import S3Server
from typer.testing import CliRunner

from server import backup
from server.app import create_app
from server.backup import BackupError, make_backup, restore_backup
from server.cli import app
from server.jobs.database import Database
from server.jobs.model import JobStatus
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.schema import migrate
from server.objects import objects_of
from server.settings import Settings
from server.storage import ArtifactStore, Variant

EVERYWHERE = pytest.mark.parametrize("make_settings", ["folder", "bucket", "postgresql"], indirect=True)
ANSWER = b'{"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": {"prompt": "covid lung"}}\n'


class Place:
    """A server's data: one finished video, one job at work, one that waits, and a file."""

    def __init__(self, settings: Settings, job_values: dict[str, Any]) -> None:
        self.settings = settings
        self.database = Database(settings.database_address)
        migrate(self.database)
        self.repository = JobRepository(self.database, lease_s=60.0, max_attempts=3)
        self.store = ArtifactStore(objects_of(settings, "artifacts"))
        self.done, self.running, self.waiting = (
            self.repository.add({**job_values, "seed": seed}, max_queued=10).id for seed in range(3)
        )
        self.finish()
        (claim,) = self.repository.claim_next(worker="w", most=lambda job: 1)
        assert claim.job.id == self.running
        with TestClient(create_app(settings)) as client:
            upload = {"file": ("lines.jsonl", ANSWER), "purpose": (None, "batch")}
            self.file = str(client.post("/v1/files", files=upload).json()["id"])

    def finish(self) -> str:
        """Make the next job's video; returns its id."""
        (claim,) = self.repository.claim_next(worker="w", most=lambda job: 1)
        files = {
            variant: (lambda path, variant=variant: path.write_bytes(variant.encode()), lambda path: None)
            for variant in Variant
        }
        stored = self.store.write_all(claim.job.id, claim.token, files)  # type: ignore[arg-type]
        work = FinishedWork(
            artifact=stored[Variant.VIDEO].name,
            size_bytes=stored[Variant.VIDEO].size_bytes,
            sha256=stored[Variant.VIDEO].sha256,
            thumbnail_sha256=stored[Variant.THUMBNAIL].sha256,
            spritesheet_sha256=stored[Variant.SPRITESHEET].sha256,
            sampling_s=1.0,
            encode_s=0.1,
            store_s=0.1,
        )
        assert self.repository.succeed_all([(claim.job.id, claim.token, work)]) == {claim.job.id}
        return claim.job.id

    def close(self) -> None:
        self.database.close()


@pytest.fixture(params=["folder", "bucket"])
def make_settings(request: pytest.FixtureRequest, tmp_path: Path, tiny_checkpoint: Path) -> Callable[[str], Settings]:
    """Settings of servers that have nothing in common: files in a folder, or in a bucket each, jobs in PostgreSQL."""

    def make(name: str) -> Settings:
        fields: dict[str, Any] = {}
        if request.param == "postgresql":
            cluster: PostgresCluster = request.getfixturevalue("postgres_cluster")
            fields = {"database_url": SecretStr(cluster.url(cluster.create_database(is_empty=True)))}
        if request.param == "bucket":
            server: S3Server = request.getfixturevalue("s3_server")
            fields = server.settings(server.make_bucket())
        return Settings(
            data_dir=tmp_path / name,
            redis_url="redis://127.0.0.1:1/0",
            checkpoints=(str(tiny_checkpoint),),
            min_free_bytes=0,
            **fields,
        )

    return make


@pytest.fixture
def place(make_settings: Callable[[str], Settings], job_values: dict[str, Any]) -> Any:
    made = Place(make_settings("old"), job_values)
    yield made
    made.close()


@EVERYWHERE
def test_what_is_put_back_is_what_was_there(
    place: Place, make_settings: Callable[[str], Settings], tmp_path: Path
) -> None:
    summary = make_backup(place.settings, tmp_path / "backup")
    assert (summary.objects, summary.damaged, summary.running) == (6, [], 1)
    after = make_settings("new")
    assert restore_backup(after, tmp_path / "backup").running == 1
    with TestClient(create_app(after)) as client:
        for variant in Variant:
            answer = client.get(f"/v1/videos/{place.done}/content", params={"variant": variant})
            assert (answer.status_code, answer.content) == (200, variant.encode())
        assert client.get(f"/v1/files/{place.file}/content").content == ANSWER
        assert client.get(f"/v1/videos/{place.waiting}").json()["status"] == "queued"
    database = Database(after.database_address)
    repository = JobRepository(database, lease_s=60.0, max_attempts=1)
    job = repository.get(place.running)
    assert job is not None
    assert (job.status, job.handed_back) == (JobStatus.QUEUED, 1), "it waits again, and has lost no attempt"
    ids = {claim.job.id for _ in range(2) for claim in repository.claim_next(worker="w", most=lambda job: 1)}
    assert ids == {place.running, place.waiting}
    database.close()


@pytest.mark.parametrize("make_settings", ["folder"], indirect=True)
def test_a_backup_of_folders_is_put_into_a_bucket(
    place: Place, make_settings: Callable[[str], Settings], s3_server: S3Server, tmp_path: Path
) -> None:
    make_backup(place.settings, tmp_path / "backup")
    fields = make_settings("new").model_dump(exclude_unset=True)
    after = Settings(**fields, **s3_server.settings(s3_server.make_bucket()))
    restore_backup(after, tmp_path / "backup")
    with TestClient(create_app(after)) as client:
        assert client.get(f"/v1/videos/{place.done}/content").content == Variant.VIDEO.encode()
    assert not (tmp_path / "new" / "artifacts").exists()


@EVERYWHERE
def test_a_file_that_is_deleted_meanwhile_is_not_missed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files, rounds = backup._copy_files, []

    def delete_first(*arguments: Any) -> None:
        if not rounds:  # the database is copied, the files are not yet
            place.repository.request_removal(place.done)
            place.store.remove_attempts(place.done)
            place.repository.forget([place.done])
        rounds.append(1)
        copy_files(*arguments)

    monkeypatch.setattr(backup, "_copy_files", delete_first)
    summary = make_backup(place.settings, tmp_path / "backup")
    assert (summary.objects, summary.damaged, len(rounds)) == (1, [], 2)


def test_a_video_that_is_made_meanwhile_may_be_missing_but_whole(
    place: Place, make_settings: Callable[[str], Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files = backup._copy_files

    def finish_first(*arguments: Any) -> None:
        place.finish()
        copy_files(*arguments)

    monkeypatch.setattr(backup, "_copy_files", finish_first)
    assert make_backup(place.settings, tmp_path / "backup").damaged == []
    after = make_settings("new")
    restore_backup(after, tmp_path / "backup")
    with TestClient(create_app(after)) as client:
        assert client.get(f"/v1/videos/{place.waiting}").json()["status"] == "queued"


def test_damage_is_told(place: Place, tmp_path: Path) -> None:
    job = place.repository.get(place.done)
    assert job is not None
    assert job.artifact is not None
    path = place.store.objects.stage("other")
    path.write_bytes(b"other bytes")
    place.store.objects.publish({path: place.store.key(job.artifact)})
    place.store.objects.remove(place.store.key(job.artifact, Variant.THUMBNAIL))
    damaged = make_backup(place.settings, tmp_path / "backup").damaged
    assert [line.partition(": ")[2] for line in damaged] == ["gone", "has another hash than when it was made"]


@pytest.mark.parametrize("name", ["database.sqlite", "files"])
def test_a_backup_that_was_altered_is_refused(place: Place, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "backup"
    make_backup(place.settings, folder)
    if name == "files":
        (path,) = [path for path in (folder / "files").rglob("*") if path.is_file()]
    else:
        path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BackupError, match="damaged"):
        restore_backup(place.settings.model_copy(update={"data_dir": tmp_path / "new", "storage_url": None}), folder)
    assert not (tmp_path / "new" / "medsora.db").exists()


def test_nothing_is_overwritten(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    make_backup(place.settings, folder)
    with pytest.raises(BackupError, match="not empty"):
        make_backup(place.settings, folder)
    with pytest.raises(BackupError, match="there is a database"):
        restore_backup(place.settings, folder)
    with pytest.raises(BackupError, match="there are files of the kind artifacts"):
        restore_backup(place.settings.model_copy(update={"database_url": _url(tmp_path / "other.db")}), folder)


def _url(path: Path) -> Any:
    return SecretStr(f"sqlite:///{path}")


def test_a_backup_that_broke_off_is_none(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    make_backup(place.settings, folder)
    (folder / "backup.json").unlink()
    with pytest.raises(BackupError, match="no whole backup"):
        restore_backup(place.settings, folder)
    (folder / "backup.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(BackupError, match="format 99"):
        restore_backup(place.settings, folder)


def test_the_commands(
    job_values: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        data_dir=tmp_path / "old", redis_url="redis://127.0.0.1:1/0", checkpoints=(str(tiny_checkpoint),)
    )
    Place(settings, job_values).close()
    monkeypatch.setenv("MEDSORA_CHECKPOINTS", str(tiny_checkpoint))
    runner, folder = CliRunner(), str(tmp_path / "backup")
    done = runner.invoke(app, ["backup", folder, "--data-dir", str(tmp_path / "old")])
    assert (done.exit_code, "database and 6 files" in done.stdout) == (0, True)
    done = runner.invoke(app, ["backup", folder, "--data-dir", str(tmp_path / "old")])
    assert (done.exit_code, "not empty" in done.stderr) == (2, True)
    done = runner.invoke(app, ["backup", str(tmp_path / "x"), "--data-dir", str(tmp_path / "none")])
    assert (done.exit_code, "there is no database" in done.stderr) == (2, True)
    done = runner.invoke(app, ["restore", folder, "--data-dir", str(tmp_path / "new")])
    assert (done.exit_code, "1 jobs were running" in done.stdout) == (0, True)
