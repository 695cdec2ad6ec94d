"""Datasets from request to archive; killed anywhere, no clip is made twice and none is lost."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Authority
from cryptography.x509.oid import ExtendedKeyUsageOID
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import func, select, update

from medsora.errors import VideoError
from medsora.fingerprints import fingerprint
from medsora.manifest import FingerprintRecord
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import probe_video
from server.app import create_app
from server.checkpoints import Catalogue
from server.dataset_runner import DatasetRunner
from server.datasets import repository as dataset_repository
from server.datasets.files import DatasetFiles
from server.datasets.model import Dataset, DatasetClip, DatasetPayload, clip_seed, planned_clips, split_counts
from server.datasets.repository import ClipOrder, DatasetRepository
from server.jobs.bulk import ClaimLostError
from server.jobs.database import Database
from server.jobs.model import Job, JobStatus
from server.jobs.queue import QueueError
from server.jobs.repository import FinishedWork, JobRepository
from server.keys.limits import Limits
from server.settings import Settings
from server.worker.dataset_clips import ClipDroppedError, DatasetClips
from server.worker.generation import request_of
from server.worker.signing import check_signature, signer_of

Finish = Callable[[str, int], FinishedWork]
Frames = np.ndarray[Any, np.dtype[np.uint8]]
BODY = {"name": "lungs", "labels": {"covid lung": 6, "regular lung": 4}, "seed": 1}


@pytest.fixture
def settings_database(database_url: str) -> SecretStr:
    """All of this is done on both databases."""
    return SecretStr(database_url)


class SilentQueue:
    """Takes every id, or none."""

    is_down = False

    def publish_hints(self, jobs: Sequence[tuple[str, int]]) -> None:
        if self.is_down:
            raise QueueError("down")


def noise(job: Any) -> Frames:
    """What hands make: a function of the seed, as a model is."""
    return np.random.default_rng(job.seed).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


class Bench:
    """A client, a runner and hands that do what workers do, on one data folder."""

    def __init__(self, client: TestClient, settings: Settings, work: Finish) -> None:
        self.client, self.settings, self._work = client, settings, work
        self.database = Database(settings.database_address)
        self.jobs = JobRepository(self.database, lease_s=60.0, max_attempts=3)
        self.files = DatasetFiles(settings.datasets_dir)
        self.datasets = DatasetRepository(self.database, lease_s=60.0)
        self.hands = DatasetClips(self.datasets, self.files)
        self.checkpoint = Catalogue.load(settings.checkpoints).default
        self.queue = SilentQueue()
        self.runner = self.new_runner()
        self.made = noise

    def new_runner(self, *, limits: Limits | None = None, **changes: Any) -> DatasetRunner:
        """A runner as another process would have one."""
        settings = self.settings.model_copy(update={"max_queued_jobs": 100, **changes})
        datasets = self.datasets
        if limits is not None:
            datasets = DatasetRepository(self.database, lease_s=60.0, limits=limits)
        return DatasetRunner(
            settings, datasets=datasets, files=self.files, repository=self.jobs, queue=self.queue,  # type: ignore[arg-type]
        )  # fmt: skip

    def create(self, **fields: Any) -> str:
        answer = self.client.post("/v1/datasets", json={**BODY, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def get(self, dataset_id: str) -> Any:
        answer = self.client.get(f"/v1/datasets/{dataset_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def look(self) -> None:
        """Let the runner look until there is nothing to do at once."""
        for _ in range(100):
            if not self.runner.look():
                return
        raise AssertionError("the runner never rests")

    def waiting(self) -> list[str]:
        """Ids of the jobs that wait, oldest first."""
        with self.database.read() as connection:
            return list(connection.scalars(select(Job.id).where(Job.status == JobStatus.QUEUED).order_by(Job.seq)))

    def count(self, table: Any) -> int:
        """Number of rows."""
        with self.database.read() as connection:
            return connection.scalar(select(func.count()).select_from(table)) or 0

    def make(self, job_id: str) -> None:
        """Make the video of a job, or fail it where the dataset drops it."""
        claim = self.jobs.claim(job_id, worker="w")
        assert claim is not None
        job = claim.job
        metadata = clip_metadata(request_of(job), model=self.checkpoint.name, model_sha256=self.checkpoint.sha256)
        try:
            self.hands.keep(self.order(job_id), claim, self.made(job), metadata, checkpoint=self.checkpoint.directory)
        except ClipDroppedError as error:
            is_settled = self.jobs.fail(job_id, claim.token, code=error.code, message=str(error))
        else:
            is_settled = self.jobs.succeed(job_id, claim.token, self._work(job_id, claim.token))
        assert is_settled

    def order(self, job_id: str) -> ClipOrder:
        return self.datasets.orders_of([job_id])[job_id]

    def fail(self, job_id: str) -> None:
        claim = self.jobs.claim(job_id, worker="w")
        assert claim is not None
        assert self.jobs.fail(job_id, claim.token, code="out_of_memory", message="too big")

    def work_off(self, dataset_id: str) -> Any:
        """Make every video of a dataset; returns it at its end."""
        for _ in range(200):
            self.look()
            if self.get(dataset_id)["status"] in ("completed", "cancelled"):
                return self.get(dataset_id)
            for job_id in self.waiting():
                self.make(job_id)
        raise AssertionError(self.get(dataset_id))

    def download(self, dataset_id: str, *, container: str = "zip") -> bytes:
        answer = self.client.get(f"/v1/datasets/{dataset_id}/content", params={"format": container})
        assert answer.status_code == 200, answer.text
        assert int(answer.headers["content-length"]) == len(answer.content)
        return answer.content

    def manifest(self, dataset_id: str) -> list[Any]:
        with zipfile.ZipFile(io.BytesIO(self.download(dataset_id))) as archive:
            return [json.loads(line) for line in archive.read("manifest.jsonl").splitlines()]


@pytest.fixture
def bench(client: TestClient, settings: Settings, finished_work: Finish) -> Iterator[Bench]:
    made = Bench(client, settings, finished_work)
    yield made
    made.database.close()


# -- what is accepted ----------------------------------------------------------------------------------------------


def test_labels_are_resolved_and_seeds_told(bench: Bench) -> None:
    dataset = bench.get(bench.create())
    assert [label["name"] for label in dataset["labels"]] == ["covid-convex", "regular-convex"]
    assert dataset["counts"] == {"total": 10, "pending": 10, "queued": 0, "running": 0, "done": 0, "missing": 0}
    assert dataset["seed"] == 1
    assert dataset["status"] == "in_progress"
    assert bench.get(bench.create(seed=None))["seed"] != bench.get(bench.create(seed=None))["seed"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"labels": {"nothing known": 3}}, "labels"),
        ({"labels": {}}, "labels"),
        ({"labels": {"covid lung": 0}}, "labels"),
        ({"labels": {"covid lung": 100_000, "regular lung": 1}}, "labels"),
        ({"labels": {"covid lung": 2, "covid-convex": 2}}, "labels"),
        ({"labels": {"covid lung": True}}, "labels"),
        ({"format": "gif"}, "format"),
        ({"splits": {}}, "splits"),
        ({"splits": {"../x": 1}}, "splits"),
        ({"splits": {"train": 0}}, "splits"),
        ({"splits": {"train": -1}}, "splits"),
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"num_inference_steps": 5000}, "num_inference_steps"),
        ({"size": "33x33"}, "size"),
        ({"model": "none"}, "model"),
        ({"fps": 9}, "fps"),
        ({"filters": {"min_motion": 0}}, "filters"),
        ({"filters": {"max_tries": 0}}, "filters"),
        ({"filters": {"drop_memorised": True}}, "filters.drop_memorised"),
        ({"filters": {"max_training_resemblance": 0.9}}, "filters.max_training_resemblance"),
        ({"filters": {"drop_memorised": True, "max_training_resemblance": 1}}, "filters"),
        ({"filters": {"colour": 3}}, "filters"),
        ({"colour": 3}, "colour"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: TestClient, fields: Any, param: str) -> None:
    answer = client.post("/v1/datasets", json={**BODY, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert client.get("/v1/datasets").json()["data"] == []


def test_a_tenant_has_so_many_unfinished_datasets(settings: Settings, tmp_path: Path) -> None:
    with TestClient(create_app(settings.model_copy(update={"max_active_datasets": 1}))) as client:
        assert client.post("/v1/datasets", json=BODY).status_code == 200
        answer = client.post("/v1/datasets", json=BODY)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "too_many_datasets"


def test_list_pages_newest_first(bench: Bench) -> None:
    ids = [bench.create() for _ in range(3)]
    first = bench.client.get("/v1/datasets", params={"limit": 2}).json()
    assert [one["id"] for one in first["data"]] == ids[:0:-1]
    assert first["has_more"]
    second = bench.client.get("/v1/datasets", params={"limit": 2, "after": first["last_id"]}).json()
    assert [one["id"] for one in second["data"]] == ids[:1]
    assert not second["has_more"]
    assert bench.client.get("/v1/datasets", params={"after": "dataset_x"}).status_code == 400


def test_what_is_not_there_is_not_found(client: TestClient) -> None:
    for dataset_id in ("x", f"dataset_{'0' * 32}"):
        path = f"/v1/datasets/{dataset_id}"
        answers = [client.get(path), client.get(f"{path}/content"), client.get(f"{path}/clips")]
        answers += [client.post(f"{path}/cancel"), client.delete(path)]
        assert [answer.status_code for answer in answers] == [404] * 5


# -- the plan ------------------------------------------------------------------------------------------------------


def test_splits_are_within_each_label_and_labels_take_turns() -> None:
    clips = planned_clips([80, 20], [0.75, 0.25])
    assert Counter((label, split) for label, _, split in clips) == {(0, 0): 60, (0, 1): 20, (1, 0): 15, (1, 1): 5}
    assert Counter(label for label, _, _ in clips[:50]) == {0: 40, 1: 10}
    assert sorted(index for label, index, _ in clips if label == 1) == list(range(20))


def test_splits_add_up() -> None:
    for count in range(30):
        assert sum(split_counts(count, [0.7, 0.2, 0.1])) == count


def test_seeds_differ_and_stay() -> None:
    seeds = {clip_seed(1, label, index, number) for label in "ab" for index in range(50) for number in (1, 2)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert clip_seed(7, "covid-convex", 0, 1) == 3732420162246168499


# -- work ----------------------------------------------------------------------------------------------------------


def test_every_clip_is_made_once(bench: Bench) -> None:
    dataset_id = bench.create(splits={"train": 0.5, "test": 0.5})
    done = bench.work_off(dataset_id)
    assert done["status"] == "completed"
    assert done["progress"] == 100
    assert [label["counts"]["done"] for label in done["labels"]] == [6, 4]
    entries = bench.manifest(dataset_id)
    assert Counter((one["label"], one["split"]) for one in entries) == {
        ("covid-convex", "train"): 3, ("covid-convex", "test"): 3,
        ("regular-convex", "train"): 2, ("regular-convex", "test"): 2,
    }  # fmt: skip
    assert len({one["seed"] for one in entries}) == 10
    assert bench.count(Job) == 10


def test_the_same_seed_plans_the_same_clips(bench: Bench) -> None:
    names = ("clip", "label", "split", "seed", "frames_sha256")
    first, second = (
        [[one[name] for name in names] for one in bench.manifest(bench.work_off(bench.create())["id"])]
        for _ in range(2)
    )
    assert first == second


def test_few_wait_at_once(bench: Bench) -> None:
    bench.create(labels={"covid lung": 5000})
    bench.look()
    assert len(bench.waiting()) == 8
    bench.look()
    assert len(bench.waiting()) == 8


def test_a_quota_holds_it_up_and_loses_nothing(bench: Bench) -> None:
    dataset_id = bench.create()
    bench.runner = bench.new_runner(limits=Limits(clips_per_day=4))
    bench.look()
    assert len(bench.waiting()) == 4
    bench.runner = bench.new_runner()
    assert bench.work_off(dataset_id)["counts"]["done"] == 10


def test_a_broker_that_is_down_loses_nothing(bench: Bench) -> None:
    dataset_id = bench.create()
    bench.queue.is_down = True
    assert bench.work_off(dataset_id)["counts"]["done"] == 10


class Killed(BaseException):
    """Ends what runs, as a kill does."""


@pytest.mark.parametrize("when", range(12))
def test_killed_between_any_two_statements_nothing_is_lost_or_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """A transaction is broken off at one of its statements; the lease runs out, and another runner goes on."""
    dataset_id = bench.create(splits={"train": 1, "test": 1})
    bench.runner.look()
    for job_id in bench.waiting()[:5]:
        bench.make(job_id)
    bench.fail(bench.waiting()[0])
    left = when

    def kill(function: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            result = function(*arguments, **named)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(dataset_repository, "insert_jobs", kill(dataset_repository.insert_jobs))
        patch.setattr(DatasetRepository, "_change", kill(DatasetRepository._change))
        patch.setattr(DatasetRepository, "settle", kill(DatasetRepository.settle))
        patch.setattr(DatasetRepository, "submit", kill(DatasetRepository.submit))
        patch.setattr(DatasetRepository, "release", kill(DatasetRepository.release))
        try:
            for _ in range(3):
                bench.runner.look()
        except Killed:
            pass
    with bench.database.write() as connection:
        connection.execute(update(Dataset).values(lease_until=0.0))
    done = bench.work_off(dataset_id)
    assert done["counts"]["done"] == 10
    assert done["dropped"] == {"out_of_memory": 1}
    assert bench.count(Job) == 11
    assert len({one["seed"] for one in bench.manifest(dataset_id)}) == 10


def test_two_runners_at_once_do_it_once(bench: Bench) -> None:
    dataset_id = bench.create()
    with bench.database.read() as connection:
        seq = connection.scalar(select(Dataset.seq))
    assert seq is not None
    claim = bench.datasets.claim(seq)
    assert claim is not None
    assert not bench.new_runner().look()
    with bench.database.write() as connection:
        connection.execute(update(Dataset).values(lease_until=0.0))
    assert bench.work_off(dataset_id)["counts"]["done"] == 10
    with pytest.raises(ClaimLostError):
        bench.datasets.submit(claim, limit=5)


def test_a_late_worker_does_not_displace_a_later_attempt(bench: Bench) -> None:
    """Of a worker that was taken for dead nothing is kept; the file of the attempt that succeeded is."""
    dataset_id = bench.create(labels={"covid lung": 1})
    bench.look()
    job_id = bench.waiting()[0]
    frozen = bench.jobs.claim(job_id, worker="frozen")
    assert frozen is not None
    with bench.database.write() as connection:
        connection.execute(update(Job).values(status="queued", lease_until=None))
    bench.make(job_id)
    request = GenerationRequest(
        label="covid-convex", seed=1, num_frames=16, height=32, width=32, num_inference_steps=4, guidance_scale=1.0,
        sampler="euler",
    )  # fmt: skip
    metadata = clip_metadata(request, model="tiny", model_sha256="0" * 64)
    bench.hands.keep(bench.order(job_id), frozen, noise(frozen.job), metadata, checkpoint=bench.checkpoint.directory)
    assert bench.work_off(dataset_id)["counts"]["done"] == 1
    assert bench.manifest(dataset_id)[0]["tries"] == 1


# -- filters -------------------------------------------------------------------------------------------------------


def test_still_clips_are_dropped_and_made_up_for(bench: Bench) -> None:
    bench.made = lambda job: noise(job) if job.seed % 2 else np.zeros((16, 32, 32, 3), np.uint8)
    dataset_id = bench.create(filters={"min_motion": 1, "max_tries": 20})
    done = bench.work_off(dataset_id)
    assert done["counts"]["done"] == 10
    entries = bench.manifest(dataset_id)
    assert all(one["seed"] % 2 and one["measures"]["motion"] > 1 for one in entries)
    assert done["dropped"] == {"dropped_motion": sum(one["tries"] - 1 for one in entries)}
    with zipfile.ZipFile(io.BytesIO(bench.download(dataset_id))) as archive:
        drops = [json.loads(line) for line in archive.read("dropped.jsonl").splitlines()]
    assert len(drops) == done["dropped"]["dropped_motion"] > 0
    with bench.database.read() as connection:
        message = connection.scalar(select(Job.error_message).where(Job.id == drops[0]["job_id"]))
    assert (
        message
        == drops[0]["message"]
        == "Its pixels change by 0 grey levels from frame to frame; at least 1 are asked for."
    )


def test_of_the_same_clip_at_once_one_is_kept(bench: Bench) -> None:
    """Both have looked at all others before either is noted."""
    same = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    bench.create(labels={"covid lung": 2}, filters={"min_distance": 2})
    bench.look()
    claims = [bench.jobs.claim(job_id, worker="w") for job_id in bench.waiting()]
    metadata = clip_metadata(
        GenerationRequest(
            label="covid-convex", seed=1, num_frames=16, height=32, width=32, num_inference_steps=4, guidance_scale=1.0,
            sampler="euler",
        ),
        model="tiny",
        model_sha256="0" * 64,
    )  # fmt: skip
    both_looked = threading.Barrier(2, timeout=60)
    add = bench.datasets.add_payload
    outcomes: list[str] = []

    def add_together(*arguments: Any, **named: Any) -> None:
        both_looked.wait()
        add(*arguments, **named)

    def keep(claim: Any) -> None:
        hands = DatasetClips(bench.datasets, bench.files)
        try:
            hands.keep(bench.order(claim.job.id), claim, same, metadata, checkpoint=bench.checkpoint.directory)
            outcomes.append("kept")
        except ClipDroppedError as error:
            outcomes.append(error.code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.datasets, "add_payload", add_together)
        threads = [threading.Thread(target=keep, args=(claim,)) for claim in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["dropped_duplicate", "kept"]


def test_duplicates_are_dropped(bench: Bench) -> None:
    """All tries come out alike: the first stays, and the shortfall is told."""
    bench.made = lambda job: np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    dataset_id = bench.create(labels={"covid lung": 3}, filters={"min_distance": 2, "max_tries": 2})
    done = bench.work_off(dataset_id)
    assert done["status"] == "completed"
    assert (done["counts"]["done"], done["shortfall"]) == (1, 2)
    assert done["dropped"] == {"dropped_duplicate": 4}
    with zipfile.ZipFile(io.BytesIO(bench.download(dataset_id))) as archive:
        assert "**Shortfall**: of 2 clips" in archive.read("README.md").decode()
    clips = bench.client.get(f"/v1/datasets/{dataset_id}/clips").json()["data"]
    assert [clip["state"] for clip in clips] == ["done", "missing", "missing"]
    assert "grey levels from another clip" in clips[1]["reason"]


def test_copies_of_training_clips_are_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrored ones too; at the bar of the checkpoint, which the dataset tells."""
    drawn = [np.random.default_rng(number).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8) for number in range(9)]
    marks, copied = b"".join(map(fingerprint, drawn)), drawn[5][:, :, ::-1]
    monkeypatch.setattr("medsora.checkpoint.load_fingerprints", lambda directory: marks)
    services = bench.client.app.state.services  # type: ignore[attr-defined]
    catalogue = services.datasets._catalogue
    served = catalogue.default
    record = FingerprintRecord(sha256="0" * 64, size_bytes=len(marks), max_resemblance=0.9)
    calibrated = replace(served, manifest=replace(served.manifest, fingerprints=record))
    monkeypatch.setattr(catalogue, "get", lambda name: calibrated)
    bench.made = lambda job: noise(job) if job.seed % 3 else copied
    dataset_id = bench.create(labels={"covid lung": 8}, filters={"drop_memorised": True, "max_tries": 20})
    done = bench.work_off(dataset_id)
    assert done["filters"]["max_training_resemblance"] == 0.9
    assert done["counts"]["done"] == 8
    assert set(done["dropped"]) == {"dropped_memorised"}
    assert all(one["measures"]["training_resemblance"] <= 0.9 for one in bench.manifest(dataset_id))


# -- the end -------------------------------------------------------------------------------------------------------


def test_cancel_keeps_what_is_done(bench: Bench) -> None:
    dataset_id = bench.create()
    bench.look()
    for job_id in bench.waiting()[:3]:
        bench.make(job_id)
    bench.look()
    assert 'medsora_num_bulk_clips_unfinished{kind="dataset"} 7.0' in bench.client.get("/metrics").text
    running = bench.jobs.claim(bench.waiting()[0], worker="w")
    assert running is not None
    assert bench.client.post(f"/v1/datasets/{dataset_id}/cancel").json()["status"] == "cancelling"
    assert 'medsora_num_bulk_clips_unfinished{kind="dataset"} 0.0' in bench.client.get("/metrics").text
    bench.look()
    assert bench.get(dataset_id)["status"] == "cancelling"
    assert bench.jobs.finish_cancel(running.job.id, running.token)
    bench.look()
    dataset = bench.get(dataset_id)
    assert dataset["status"] == "cancelled"
    assert dataset["counts"] == {"total": 10, "pending": 0, "queued": 0, "running": 0, "done": 3, "missing": 7}
    assert bench.waiting() == []
    assert len(bench.manifest(dataset_id)) == 3
    assert bench.client.post(f"/v1/datasets/{dataset_id}/cancel").json()["status"] == "cancelled"


def test_what_is_completed_cannot_be_cancelled(bench: Bench) -> None:
    dataset_id = bench.create(labels={"covid lung": 1})
    bench.work_off(dataset_id)
    answer = bench.client.post(f"/v1/datasets/{dataset_id}/cancel")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "dataset_not_cancellable"


def test_delete_removes_all_of_it_and_nothing_else(bench: Bench) -> None:
    other = bench.create()
    bench.work_off(other)
    dataset_id = bench.create(seed=2)
    bench.look()
    for job_id in bench.waiting()[:3]:
        bench.make(job_id)
    bench.look()
    assert bench.client.delete(f"/v1/datasets/{dataset_id}").json()["deleted"] is True
    assert bench.client.get(f"/v1/datasets/{dataset_id}").status_code == 404
    assert bench.client.delete(f"/v1/datasets/{dataset_id}").status_code == 404
    bench.look()
    assert bench.waiting() == []
    assert bench.count(Dataset) == 1
    assert (bench.count(DatasetClip), bench.count(DatasetPayload)) == (10, 10)
    assert {found.dataset_id for found in bench.files.files()} == {other}
    assert len(bench.manifest(other)) == 10


def test_orphans_are_removed(bench: Bench) -> None:
    dataset_id = bench.create(labels={"covid lung": 2})
    bench.work_off(dataset_id)
    objects = bench.files.objects
    kept = next(bench.files.files()).key
    strays = (bench.files.key(dataset_id, f"video_{'1' * 32}", 1), kept.rpartition(".")[0] + ".7", f"{kept}.part")
    for key in strays:
        objects.stage(key).write_bytes(b"x")
    assert bench.runner.remove_orphans(older_than_s=3600) == 0
    assert bench.runner.remove_orphans(older_than_s=-1) == 3
    assert not {found.key for found in objects.list()} & set(strays)
    assert len(bench.manifest(dataset_id)) == 2


def test_a_deleted_video_of_a_dataset_that_is_done_leaves_the_clip(bench: Bench) -> None:
    dataset_id = bench.create(labels={"covid lung": 2})
    bench.work_off(dataset_id)
    assert bench.client.delete(f"/v1/videos/{bench.manifest(dataset_id)[0]['video_id']}").status_code == 200
    with zipfile.ZipFile(io.BytesIO(bench.download(dataset_id))) as archive:
        assert archive.testzip() is None


# -- archives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["zip", "tar"])
@pytest.mark.parametrize("dataset_format", ["videofolder", "webdataset", "ffv1", "png", "dicom"])
def test_files_are_as_the_manifest_says(bench: Bench, dataset_format: str, container: str) -> None:
    dataset_id = bench.create(format=dataset_format, labels={"covid lung": 3})
    bench.work_off(dataset_id)
    content = bench.download(dataset_id, container=container)
    if container == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None
            files = {name: archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    if dataset_format == "webdataset":
        with tarfile.open(fileobj=io.BytesIO(files["shards/train-000000.tar"])) as tar:
            files |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for line in files["manifest.jsonl"].splitlines():
        for entry in json.loads(line)["files"]:
            assert hashlib.sha256(files[entry["path"]]).hexdigest() == entry["sha256"]
            assert len(files[entry["path"]]) == entry["size_bytes"]
    assert "Synthetic" in files["README.md"].decode()


@pytest.mark.parametrize("dataset_format", ["videofolder", "webdataset"])
def test_clips_are_signed_where_there_is_a_certificate(bench: Bench, tmp_path: Path, dataset_format: str) -> None:
    """And the manifest has the hash without the signature, by which they are made again."""
    authority = Authority()
    issued = authority.issue("signer.example.com", ExtendedKeyUsageOID.EMAIL_PROTECTION)
    (tmp_path / "chain.pem").write_bytes(issued.certificate + authority.certificate)
    (tmp_path / "key.pem").write_bytes(issued.key)
    paths = {"c2pa_certificate": tmp_path / "chain.pem", "c2pa_private_key": tmp_path / "key.pem"}
    signer = signer_of(bench.settings.model_copy(update=paths))
    made = {}
    for hands in (DatasetClips(bench.datasets, bench.files, signer=signer), bench.hands):
        bench.hands = hands
        dataset_id = bench.create(format=dataset_format, labels={"covid lung": 2})
        bench.work_off(dataset_id)
        made[hands] = bench.manifest(dataset_id)
        with zipfile.ZipFile(io.BytesIO(bench.download(dataset_id))) as archive:
            archive.extractall(tmp_path / dataset_id)
        folder = tmp_path / dataset_id
        assert "signed C2PA manifest" in (folder / "README.md").read_text()
        for shard in folder.glob("shards/*.tar"):
            with tarfile.open(shard) as tar:
                tar.extractall(folder, filter="data")
        for line in made[hands]:
            path = folder / line["files"][0]["path"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == line["files"][0]["sha256"]
            if "unsigned_sha256" in line["files"][0]:
                check_signature(path)
            else:
                with pytest.raises(VideoError, match="no C2PA manifest"):
                    check_signature(path)
            assert json.loads(probe_video(path).metadata["comment"])["synthetic"] is True
    signed, plain = made.values()
    for one, other in zip(signed, plain, strict=True):
        assert one["files"][0]["unsigned_sha256"] == other["files"][0]["sha256"]
        assert one["files"][0]["size_bytes"] > other["files"][0]["size_bytes"]


def test_ranges_of_a_partial_download_add_up(bench: Bench) -> None:
    dataset_id = bench.create(format="png")
    path = f"/v1/datasets/{dataset_id}/content"
    answer = bench.client.get(path)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "dataset_not_ready"
    bench.look()
    for job_id in bench.waiting()[:4]:
        bench.make(job_id)
    bench.runner.look()
    whole = bench.client.get(path)
    assert len(bench.manifest(dataset_id)) == 4
    parts, step = [], 70_001
    for begin in range(0, len(whole.content), step):
        part = bench.client.get(
            path, headers={"range": f"bytes={begin}-{begin + step - 1}", "if-range": whole.headers["etag"]}
        )
        assert part.status_code == 206
        assert int(part.headers["content-length"]) == len(part.content)
        end = min(begin + step, len(whole.content))
        assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(whole.content)}"
        parts.append(part.content)
    assert b"".join(parts) == whole.content
    assert bench.client.get(path, headers={"range": "bytes=-10"}).content == whole.content[-10:]
    assert bench.client.get(path, headers={"range": "bytes=100-"}).content == whole.content[100:]
    beyond = bench.client.get(path, headers={"range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416
    assert bench.client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    bench.work_off(dataset_id)
    later = bench.client.get(path, headers={"range": "bytes=0-9", "if-range": whole.headers["etag"]})
    assert (later.status_code, later.headers["etag"] != whole.headers["etag"]) == (200, True)


def test_other_processes_send_the_same_bytes(bench: Bench, settings: Settings) -> None:
    dataset_id = bench.create()
    bench.work_off(dataset_id)
    with TestClient(create_app(settings)) as other:
        assert other.get(f"/v1/datasets/{dataset_id}/content").content == bench.download(dataset_id)


def test_a_client_that_goes_leaves_nothing_open(bench: Bench, settings: Settings) -> None:
    dataset_id = bench.create(format="ffv1", labels={"covid lung": 2})
    bench.work_off(dataset_id)
    services = bench.client.app.state.services  # type: ignore[attr-defined]
    dataset = services.datasets.get("default", dataset_id)
    archive = services.datasets.archive(dataset, "tar")
    reading = archive.read(0, archive.size())
    assert any(len(chunk) > 20_000 for chunk in reading)  # stops within the first clip

    def has_open() -> bool:
        names = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return any(str(settings.datasets_dir) in name for name in names)

    assert has_open()
    reading.close()
    assert not has_open()


def test_an_unknown_container_is_refused(bench: Bench) -> None:
    answer = bench.client.get(f"/v1/datasets/{bench.create()}/content", params={"format": "rar"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "format"
