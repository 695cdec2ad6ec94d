"""A job database, a store and an application on temporary folders; no broker answers here."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from postgres_cluster import PostgresCluster
from pydantic import SecretStr
from sqlalchemy import update

import server.jobs.schema
from server.app import create_app
from server.jobs.database import Database, database_now
from server.jobs.model import Job
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.schema import migrate
from server.sealing import Sealer
from server.settings import Settings

DEAD_BROKER = "redis://127.0.0.1:1/0"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MEDSORA_* variable of the machine may change a test."""
    for name in [name for name in os.environ if name.startswith("MEDSORA_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _clients_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test clients call the server as one calls it on one's own machine; else they would need keys."""
    _, *others = TestClient.__init__.__defaults__ or ()
    monkeypatch.setattr(TestClient.__init__, "__defaults__", ("http://127.0.0.1", *others))


@pytest.fixture(scope="session")
def new_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the newest schema."""
    path = tmp_path_factory.mktemp("new-sqlite") / "jobs.db"
    made = Database(f"sqlite:///{path}")
    migrate(made)
    made.close()
    return path


@pytest.fixture(autouse=True)
def _new_databases_are_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All migrations take some tenths of a second: only who tests them waits for them."""
    if "empty_database_url" in request.fixturenames:
        return
    new_sqlite: Path = request.getfixturevalue("new_sqlite")
    upgrade = server.jobs.schema._upgrade

    def upgrade_or_copy(database: Database) -> None:
        path = Path(str(database.url.database))
        if database.is_sqlite and path.stat().st_size == 0:
            shutil.copyfile(new_sqlite, path)
        else:
            upgrade(database)

    monkeypatch.setattr(server.jobs.schema, "_upgrade", upgrade_or_copy)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the jobs are kept: each test that uses this runs on both databases."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    yield request.getfixturevalue("postgres_url")


@pytest.fixture
def open_two_apps() -> Callable[[Settings], AbstractContextManager[list[TestClient]]]:
    """Two applications on one database, as two API processes are."""

    @contextmanager
    def open_them(settings: Settings) -> Iterator[list[TestClient]]:
        with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
            for client in (one, other):
                # An app makes up its routes at the first request; two in one process, at once, would trip over each
                # other.
                assert client.get("/nowhere").status_code == 404
            yield [one, other]

    return open_them


@pytest.fixture
def postgres_url(postgres_cluster: PostgresCluster) -> Iterator[str]:
    """A database with the newest schema, for what concerns PostgreSQL alone."""
    name = postgres_cluster.create_database()
    yield postgres_cluster.url(name)
    postgres_cluster.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'jobs.db'}"
        return
    cluster: PostgresCluster = request.getfixturevalue("postgres_cluster")
    name = cluster.create_database(is_empty=True)
    yield cluster.url(name)
    cluster.drop_database(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A job database with the newest schema."""
    made = Database(database_url)
    migrate(made)
    yield made
    made.close()


@pytest.fixture
def sealer(tmp_path: Path) -> Sealer:
    """With a key of its own."""
    return Sealer(Settings(data_dir=tmp_path))


@pytest.fixture
def repository(database: Database) -> JobRepository:
    """Jobs with a lease of 60 s and three attempts."""
    return JobRepository(database, lease_s=60.0, max_attempts=3)


@pytest.fixture
def job_values() -> dict[str, Any]:
    """Columns of a job as the service resolves them."""
    return {
        "model": "tiny",
        "prompt": "covid lung",
        "label": "covid-convex",
        "seed": 7,
        "num_frames": 16,
        "width": 32,
        "height": 32,
        "fps": 8.0,
        "seconds": "2",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "sampler": "euler",
    }


@pytest.fixture
def add_job(repository: JobRepository, job_values: dict[str, Any]) -> Callable[..., str]:
    """Insert a waiting job; returns its id."""

    def add(**changes: Any) -> str:
        return repository.add({**job_values, **changes}, max_queued=1000).id

    return add


@pytest.fixture
def expire_lease(database: Database) -> Callable[[str], None]:
    """Let the lease of a job have run out a second ago."""

    def expire(job_id: str) -> None:
        with database.write() as connection:
            connection.execute(update(Job).where(Job.id == job_id).values(lease_until=database_now() - 1.0))

    return expire


@pytest.fixture
def finished_work() -> Callable[[str, int], FinishedWork]:
    """The report of a worker that made the video of a job."""

    def work(job_id: str, token: int) -> FinishedWork:
        name = f"{job_id[6:8]}/{job_id}.{token}.mp4"
        return FinishedWork(artifact=name, size_bytes=3, sha256="0" * 64, sampling_s=1.0, encode_s=0.02, store_s=0.003)

    return work


@pytest.fixture
def settings_database() -> SecretStr | None:
    """Where applications keep their jobs, SQLite; modules about what is stored run on both (``database_url``)."""
    return None


@pytest.fixture
def settings(tmp_path: Path, tiny_checkpoint: Path, settings_database: SecretStr | None) -> Settings:
    """Settings of an API without broker or workers."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    return Settings(
        data_dir=data_dir,
        database_url=settings_database,
        redis_url=DEAD_BROKER,
        checkpoints=(str(tiny_checkpoint),),
        max_queued_jobs=5,
        min_free_bytes=0,
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """A client of a running application."""
    with TestClient(create_app(settings)) as made:
        yield made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On PostgreSQL too, datasets and each moment at which a batch may be killed are a minute of their own each: all of
    them where MEDSORA_TEST_ALL_DATABASES asks for it, else no datasets and every third moment."""
    if os.environ.get("MEDSORA_TEST_ALL_DATABASES"):
        return
    kept: list[pytest.Item] = []
    twice: list[pytest.Item] = []
    for item in items:
        moment = (
            item.callspec.params.get("at", 0) if isinstance(item, pytest.Function) and "at" in item.fixturenames else 0
        )
        is_twice = "postgresql" in item.name and (item.path.name == "test_datasets.py" or moment % 3 != 0)
        (twice if is_twice else kept).append(item)
    config.hook.pytest_deselected(items=twice)
    items[:] = kept
