"""Histograms and counters in the database: buckets, many writers, nothing that falls."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from server.app import create_app
from server.jobs.database import Database
from server.jobs.measures import JOB_MEASURES, LATENCY, STAGES, STEP
from server.jobs.repository import FinishedWork, JobRepository
from server.measures import Measure, MeasureSum, Observation, add_observations, read_measures
from server.observability import HTTP_SECONDS, HttpMetrics
from server.settings import Settings

LENGTH = Measure(name="length", about="Of a thing.", labels=("kind",), edges=(1.0, 2.0, 5.0))
SEEN = Measure(name="seen", about="Things.", labels=("kind",))


def write(database: Database, *observations: Observation) -> None:
    with database.write() as connection:
        add_observations(connection, observations)


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_edge_belongs_to_its_bucket(database: Database) -> None:
    write(database, *[Observation(LENGTH, ("long",), value) for value in (0.5, 1.0, 1.5, 5.0, 7.0)])
    sums = read_measures(database, [LENGTH])["length"]["long",]
    assert sums.cumulative(LENGTH) == [("1.0", 2), ("2.0", 3), ("5.0", 4), ("+Inf", 5)]
    assert (sums.count, sums.total) == (5, 15.0)


def test_what_was_counted_with_other_edges_stays_counted(database: Database) -> None:
    write(database, Observation(LENGTH, ("long",), 1.5))
    finer = Measure(name="length", about="Of a thing.", labels=("kind",), edges=(1.0, 1.25, 3.0))
    write(database, Observation(finer, ("long",), 1.1))
    sums = read_measures(database, [finer])["length"]["long",]
    assert sums.cumulative(finer) == [("1.0", 0), ("1.25", 1), ("3.0", 2), ("+Inf", 2)]


def test_a_transaction_that_fails_counts_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as connection:  # noqa: PT012
        add_observations(connection, [Observation(SEEN, ("a",))])
        raise RuntimeError
    assert read_measures(database, [SEEN]) == {"seen": {}}


def test_many_writers_at_once_lose_nothing(database: Database) -> None:
    def many() -> None:
        for number in range(25):
            write(database, Observation(LENGTH, ("a",), number % 3), Observation(SEEN, ("b",)))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_measures(database, [LENGTH, SEEN])
    assert found["length"]["a",].count == 100
    assert found["seen"]["b",].count == 100


def test_a_finished_job_is_measured_once_in_every_histogram(
    repository: JobRepository,
    database: Database,
    add_job: Callable[..., str],
    finished_work: Callable[[str, int], FinishedWork],
) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    work = finished_work(job_id, claim.token)
    assert repository.succeed(job_id, claim.token, work)
    assert not repository.succeed(job_id, claim.token, work), "a second report is of nothing"
    found = read_measures(database, JOB_MEASURES)
    assert found[LATENCY.name]["tiny", "succeeded"].count == 1
    assert {labels: sums.total for labels, sums in found[STAGES.name].items()} == {
        ("tiny", "sample"): 1.0,
        ("tiny", "encode"): 0.02,
        ("tiny", "store"): 0.003,
    }
    assert found[STEP.name]["tiny",].cumulative(STEP)[8:10] == [("0.5", 1), ("1.0", 1)]  # 1 s in 4 steps
    assert found["medsora_real_time_factor"]["tiny",].total == pytest.approx(1.023 / 2.0)  # of a video of 2 s
    counted = {"requests": 1.0, "frames_generated": 16.0, "video_seconds_generated": 2.0}
    for name, total in counted.items():
        assert [sums.total for sums in found[f"medsora_{name}"].values()] == [total]
    assert found["medsora_jobs_redelivered"] == {}
    before = found
    repository.request_removal(job_id)
    assert repository.forget([job_id]) == 1
    assert read_measures(database, JOB_MEASURES) == before, "what was counted stays when the row goes"


def test_every_end_is_measured(
    repository: JobRepository,
    database: Database,
    add_job: Callable[..., str],
    expire_lease: Callable[[str], None],
) -> None:
    failed, canceled, lost = add_job(), add_job(), add_job()
    claim = repository.claim(failed, worker="w")
    assert claim is not None
    repository.fail(failed, claim.token, code="out_of_memory", message="m")
    repository.request_cancel(canceled)
    for _ in range(3):
        assert repository.claim(lost, worker="w") is not None
        expire_lease(lost)
        repository.sweep_expired()
    found = read_measures(database, JOB_MEASURES)
    assert {labels: sums.count for labels, sums in found[LATENCY.name].items()} == {
        ("tiny", "failed"): 2,
        ("tiny", "canceled"): 1,
    }
    assert {labels: sums.count for labels, sums in found["medsora_requests_failed"].items()} == {
        ("tiny", "out_of_memory"): 1,
        ("tiny", "attempts_exhausted"): 1,
    }
    assert {labels: sums.total for labels, sums in found["medsora_requests"].items()} == {
        ("tiny", "failed"): 2.0,
        ("tiny", "canceled"): 1.0,
    }
    assert found["medsora_jobs_redelivered"]["tiny",].total == 2.0
    assert found[STAGES.name] == {}
    assert found["medsora_frames_generated"] == {}


def test_requests_to_one_process_are_seen_in_the_metrics_of_another(settings: Settings) -> None:
    count = "medsora_http_request_seconds_count"
    key = (count, (("method", "GET"), ("route", "/v1/models"), ("status", "200")))
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        for _ in range(3):
            one.get("/v1/models")
        one.get("/metrics")  # which brings its own to the database
        other.get("/v1/models")
        assert samples(other)[key] == 4
        assert samples(one)[key] == 4
    with TestClient(create_app(settings)) as restarted:
        assert samples(restarted)[key] == 4, "a counter falls with no process"


def test_what_cannot_be_written_now_is_written_later(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = HttpMetrics(interval_s=3600.0)
    metrics.observe("GET", "/v1/models", 200, 0.004)
    metrics.start(database)

    def locked(*_: Any) -> None:
        raise OperationalError("insert", {}, Exception("database is locked"))

    with monkeypatch.context() as patch:
        patch.setattr("server.observability.add_sums", locked)
        metrics.flush()
    metrics.observe("GET", "/v1/models", 200, 0.004)
    metrics.close()
    (sums,) = read_measures(database, [HTTP_SECONDS])[HTTP_SECONDS.name].values()
    assert (sums.count, sums.total) == (2, 0.008)


def test_the_text_is_that_of_histograms(client: TestClient) -> None:
    client.get("/v1/models")
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert families["medsora_http_request_seconds"].type == "histogram"
    buckets = [
        sample.value
        for sample in families["medsora_http_request_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["route"] == "/v1/models"
    ]
    assert len(buckets) == len(HTTP_SECONDS.edges) + 1
    assert buckets == sorted(buckets)
    assert families["medsora_request_latency_seconds"].type == "histogram"


def test_labels_that_are_kept_hold_no_id(client: TestClient) -> None:
    client.get("/v1/videos/video_" + "0" * 32)
    client.get("/canary-in-the-path")
    client.request("CANARY", "/v1/models")
    client.get("/metrics")
    database = client.app.state.services.database  # type: ignore[attr-defined]
    with database.read() as connection:
        labels = " ".join(connection.scalars(select(MeasureSum.labels)))
    assert "canary" not in labels.lower()
    assert "0" * 32 not in labels
