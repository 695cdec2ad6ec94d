"""The job protocol under random histories of clients, workers, crashes and lost leases."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from sqlalchemy import select, update

from server.jobs.database import Database, database_now, migrate
from server.jobs.model import TERMINAL, TRANSITIONS, Job, JobStatus
from server.jobs.repository import FinishedWork, JobRepository, Removal

MAX_ATTEMPTS = 3
VALUES: dict[str, Any] = {
    "model": "m", "prompt": "p", "label": "l", "seed": 0, "num_frames": 16, "width": 32, "height": 32, "fps": 8.0,
    "seconds": "2", "num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "euler",
}  # fmt: skip


class JobProtocol(RuleBasedStateMachine):
    """Rules do what clients, workers and reapers do, in any order; invariants look at the table."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._database = Database(f"sqlite:///{Path(self._folder.name) / 'jobs.db'}")
        migrate(self._database)
        self._repository = JobRepository(self._database, lease_s=60.0, max_attempts=MAX_ATTEMPTS)
        self._seen: dict[str, tuple[JobStatus, int]] = {}
        self._results: dict[str, int] = {}
        self._removed: set[str] = set()

    def teardown(self) -> None:
        self._database.close()
        self._folder.cleanup()

    @rule(target=jobs)
    def submit(self) -> str:
        return self._repository.add(VALUES, max_queued=100).id

    @rule(target=claims, job_id=jobs)
    def claim(self, job_id: str) -> tuple[str, int]:
        claim = self._repository.claim(job_id, worker="w")
        return (job_id, claim.token if claim is not None else 0)

    @rule(claim=claims, steps=st.integers(0, 4))
    def renew(self, claim: tuple[str, int], steps: int) -> None:
        self._repository.renew(*claim, steps_done=steps)

    @rule(claim=claims)
    def succeed(self, claim: tuple[str, int]) -> None:
        work = FinishedWork(artifact="a", size_bytes=1, sha256="s", sampling_s=1.0, encode_s=0.0, store_s=0.0)
        if self._repository.succeed(*claim, work):
            self._results[claim[0]] = self._results.get(claim[0], 0) + 1
            assert claim[0] not in self._removed, "a result was published after the client had deleted the job"

    @rule(claim=claims)
    def fail(self, claim: tuple[str, int]) -> None:
        self._repository.fail(*claim, code="c", message="m")

    @rule(claim=claims)
    def hand_back(self, claim: tuple[str, int]) -> None:
        self._repository.hand_back(*claim)

    @rule(claim=claims)
    def finish_cancel(self, claim: tuple[str, int]) -> None:
        job_id, token = claim
        if self._repository.renew(job_id, token, steps_done=0) is True:
            self._repository.finish_cancel(job_id, token)

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        self._repository.request_cancel(job_id)

    @rule(job_id=jobs)
    def remove(self, job_id: str) -> None:
        if self._repository.request_removal(job_id) is not Removal.MISSING:
            self._removed.add(job_id)

    @rule(job_id=jobs)
    def lease_runs_out(self, job_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(
                update(Job).where(Job.id == job_id, Job.status == "running").values(lease_until=database_now() - 1)
            )

    @rule()
    def reap(self) -> None:
        self._repository.sweep_expired()
        self._repository.forget([job.id for job in self._repository.removable(limit=100)])

    @invariant()
    def only_legal_transitions(self) -> None:
        with self._database.read() as connection:
            rows = {row.id: row for row in connection.execute(select(Job.__table__))}
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


JobProtocol.TestCase.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestJobProtocol = JobProtocol.TestCase
