"""The job protocol under random histories of clients, APIs, workers and reapers that die, and brokers that forget.

Everything is real but the broker, which is a list, and time, which goes by as all that is written moves back.
"""

import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import select, update

from server.events.log import EventLog
from server.files.store import FileStore
from server.idempotency import Answer, Begun, IdempotentRequest, IdempotentRequests, InProgress, Made, working_on
from server.jobs.database import Database
from server.jobs.model import TERMINAL, TRANSITIONS, Job, JobStatus
from server.jobs.queue import JobQueue
from server.jobs.repository import Claim, FinishedWork, JobRepository, Removal
from server.jobs.schema import migrate
from server.jobs.workers import WorkerRegistry
from server.keys.limits import NO_LIMITS, TenantLimits
from server.reaper import Reaper
from server.sealing import Sealer
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.storage import ArtifactStore
from server.webhooks.repository import WebhookRepository

MAX_ATTEMPTS = 3
LEASE_S = 60.0
VALUES: dict[str, Any] = {
    "model": "m", "prompt": "p", "label": "l", "seed": 0, "num_frames": 16, "width": 32, "height": 32, "fps": 8.0,
    "seconds": "2", "num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "euler",
}  # fmt: skip
NUMBERS = st.integers(0, 10**6)
KEYS = st.sampled_from(["a", "b", "c"])


class Broker:
    """What a queue does with hints."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def publish_hints(self, jobs: list[tuple[str, int]]) -> None:
        self.messages += [job_id for job_id, _ in jobs]

    def length(self) -> int:
        return len(self.messages)


@cache
def _empty_database() -> bytes:
    """Its file: migrations take longer than a whole history."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.db"
        database = Database(f"sqlite:///{path}")
        migrate(database)
        database.close()
        return path.read_bytes()


class JobProtocol(RuleBasedStateMachine):
    """Rules do what clients, workers and reapers do, in any order; invariants look at the tables and the files."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        root = Path(self._folder.name)
        (root / "jobs.db").write_bytes(_empty_database())
        self._database = Database(f"sqlite:///{root / 'jobs.db'}")
        options = Settings(data_dir=root, lease_s=LEASE_S, orphan_scan_s=0.001, max_attempts=MAX_ATTEMPTS)
        sealer = Sealer(options)
        self._repository = JobRepository(self._database, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS)
        self._requests = IdempotentRequests(self._database, sealer)
        self._limits = TenantLimits(self._database, NO_LIMITS)
        self._store = ArtifactStore(options.artifacts_dir)
        self._broker = Broker()
        self._reaper = Reaper(
            options,
            repository=self._repository,
            workers=WorkerRegistry(self._database, heartbeat_s=1.0),
            store=self._store,
            queue=cast(JobQueue, self._broker),
            events=EventLog(self._database),
            sources=SourceRepository(self._database),
            source_store=FileStore(options.sources_dir),
            webhooks=WebhookRepository(self._database, sealer),
        )
        self._accepted: list[str] = []
        self._of_key: dict[str, str] = {}
        self._claims: list[Claim] = []
        """Whether or not they still hold: who was frozen does not know."""
        self._seen: dict[str, tuple[JobStatus, int]] = {}
        self._results: dict[str, int] = {}
        self._removed: set[str] = set()

    def teardown(self) -> None:
        try:
            self._come_to_rest()
        finally:
            self._database.close()
            self._folder.cleanup()

    # -- clients and APIs ------------------------------------------------------------------------------------

    @rule(key=KEYS, api_dies=st.sampled_from(["", "", "before it publishes", "before it answers"]))
    def submit(self, key: str, api_dies: str) -> None:
        outcome = self._requests.begin("default", key, "fingerprint")
        if isinstance(outcome, InProgress):
            return
        if isinstance(outcome, Answer):
            assert outcome.body.decode() == self._of_key[key]
            return
        if isinstance(outcome, Made):
            assert outcome.object_id == self._of_key[key]
            return
        assert isinstance(outcome, Begun)
        with working_on(outcome):
            job_id = self._repository.add(VALUES, max_queued=1000).id
        assert key not in self._of_key, "a key has made two jobs"
        self._of_key[key] = job_id
        self._accepted.append(job_id)
        if api_dies != "before it publishes":
            self._broker.publish_hints([(job_id, 0)])
            self._repository.mark_published([job_id])
        if not api_dies:
            self._requests.finish(outcome, Answer(200, "application/json", job_id.encode()))

    @rule()
    def submit_without_a_key(self) -> None:
        self._accepted.append(self._repository.add(VALUES, max_queued=1000).id)

    @precondition(lambda self: self._accepted)
    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        job_id = self._accepted[number % len(self._accepted)]
        before = self._repository.get(job_id)
        asked = self._repository.request_cancel(job_id)
        if before is not None:
            assert asked == (before.status not in TERMINAL)

    @precondition(lambda self: self._accepted)
    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        job_id = self._accepted[number % len(self._accepted)]
        if self._repository.request_removal(job_id) is not Removal.MISSING:
            self._removed.add(job_id)
        assert self._repository.get(job_id) is None

    # -- workers ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self._broker.messages)
    @rule(most=st.integers(1, 3))
    def take_a_message(self, most: int) -> None:
        self._broker.messages.pop(0)
        self._claims += self._repository.claim_next(worker="w", most=lambda _: most)

    @precondition(lambda self: self._broker.messages)
    @rule()
    def worker_dies_with_a_message(self) -> None:
        self._broker.messages.pop(0)

    @precondition(lambda self: self._claims)
    @rule(number=NUMBERS, steps=st.integers(0, 4))
    def beat(self, number: int, steps: int) -> None:
        claim = self._claims[number % len(self._claims)]
        if self._repository.renew(claim.job.id, claim.token, steps_done=steps) is None:
            self._claims.remove(claim)

    @precondition(lambda self: self._claims)
    @rule(number=NUMBERS, dies=st.sampled_from(["", "", "before it commits", "before it hears of the commit"]))
    def finish(self, number: int, dies: str) -> None:
        claim = self._claims.pop(number % len(self._claims))
        stored = self._store.write(
            claim.job.id, claim.token, lambda path: path.write_bytes(b"video") and None, lambda path: None
        )
        if dies == "before it commits":
            return
        work = FinishedWork(
            artifact=stored.name, size_bytes=5, sha256=stored.sha256, sampling_s=1.0, encode_s=0.0, store_s=0.0
        )
        if self._repository.succeed(claim.job.id, claim.token, work):
            self._results[claim.job.id] = self._results.get(claim.job.id, 0) + 1
            assert claim.job.id not in self._removed, "a result was published after the client had deleted the job"
        elif not dies:
            self._store.remove(stored.name)
            self._repository.finish_cancel(claim.job.id, claim.token)

    @precondition(lambda self: self._claims)
    @rule(number=NUMBERS, how=st.sampled_from(["fails", "is handed back", "dies"]))
    def give_up(self, number: int, how: str) -> None:
        claim = self._claims.pop(number % len(self._claims))
        if how == "fails":
            self._repository.fail(claim.job.id, claim.token, code="c", message="m")
        elif how == "is handed back":
            self._repository.hand_back(claim.job.id, claim.token)

    # -- everything else -------------------------------------------------------------------------------------

    @rule()
    def wipe_the_broker(self) -> None:
        self._broker.messages.clear()

    @rule(seconds=st.sampled_from([3.0, 20.0, LEASE_S + 1, 2 * LEASE_S + 1]))
    def time_goes_by(self, seconds: float) -> None:
        times = (Job.lease_until, Job.published_at, Job.queued_at, Job.created_at, Job.started_at, Job.completed_at)
        with self._database.write() as connection:
            connection.execute(update(Job).values({column: column - seconds for column in times}))
            moved = {IdempotentRequest.lease_until: IdempotentRequest.lease_until - seconds}
            connection.execute(update(IdempotentRequest).values(moved))
        for file in self._store.files():
            then = time.time() - file.age_s - seconds
            os.utime(self._store.path(file.name), (then, then))

    @rule()
    def reap(self) -> None:
        self._reaper.sweep()

    # -- what must hold --------------------------------------------------------------------------------------

    @invariant()
    def only_legal_transitions(self) -> None:
        rows = self._rows()
        for job_id, (before, attempt) in self._seen.items():
            row = rows.get(job_id)
            if row is None:
                assert job_id in self._removed, "a job was lost"
                continue
            status = JobStatus(row.status)
            assert status is before or status in TRANSITIONS[before], f"{before} -> {status}"
            assert row.attempt >= attempt, "the fencing token fell"
            assert row.attempt - row.handed_back <= MAX_ATTEMPTS
            assert (row.completed_at is not None) == (status in TERMINAL)
            assert (row.lease_until is not None) == (status is JobStatus.RUNNING)
            assert (row.artifact is not None) == (status is JobStatus.SUCCEEDED)
        self._seen = {job_id: (JobStatus(row.status), row.attempt) for job_id, row in rows.items()}

    @invariant()
    def one_result_a_job(self) -> None:
        assert all(count == 1 for count in self._results.values())

    @invariant()
    def what_is_told_to_be_there_is_there(self) -> None:
        for row in self._rows().values():
            if row.artifact is not None and row.id not in self._removed:
                assert self._store.path(row.artifact).read_bytes() == b"video"

    @invariant()
    def what_was_accepted_was_counted(self) -> None:
        usage = self._limits.usage("default")
        assert usage.clips == len(self._accepted)
        assert usage.queued_jobs == sum(row.status == "queued" for row in self._rows().values())

    def _rows(self) -> dict[str, Any]:
        with self._database.read() as connection:
            return {row.id: row for row in connection.execute(select(Job.__table__))}

    def _come_to_rest(self) -> None:
        """With workers and a reaper that live, all comes to an end, and nothing is left over."""
        self._claims.clear()
        for _ in range(4 * len(self._accepted) + 4):
            self.time_goes_by(2 * LEASE_S + 1)
            self.reap()
            self.only_legal_transitions()
            while self._broker.messages:
                self.take_a_message(3)
                self.only_legal_transitions()
                while self._claims:
                    self.finish(0, "")
                self.only_legal_transitions()
            if not self._broker.messages and all(row.status in TERMINAL for row in self._rows().values()):
                break
        self.time_goes_by(2 * LEASE_S + 1)
        self.reap()
        rows = self._rows()
        assert {row.status for row in rows.values()} <= TERMINAL, "a job has come to no end"
        assert set(rows) == set(self._accepted) - self._removed
        self.one_result_a_job()
        self.what_is_told_to_be_there_is_there()
        files = {file.name for file in self._store.files()}
        assert files == {row.artifact for row in rows.values() if row.artifact is not None}


JobProtocol.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestJobProtocol = JobProtocol.TestCase
