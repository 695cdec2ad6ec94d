"""Spans of requests and attempts, kept in memory; and nothing at all where nobody asks for traces."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server import tracing
from server.jobs.repository import FinishedWork, JobRepository
from server.worker.attempts import trace_attempt

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What was traced."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    exporter = InMemorySpanExporter()
    tracing.start_tracing("api", processor=SimpleSpanProcessor(exporter))
    yield exporter
    tracing.stop_tracing()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def test_an_attempt_belongs_to_the_request_and_that_to_the_caller(
    client: TestClient, spans: InMemorySpanExporter
) -> None:
    answer = client.post("/v1/videos", json={"prompt": "covid lung"}, headers={"traceparent": CALLER})
    request = by_name(spans)["POST /v1/videos"]
    assert request.context is not None
    assert f"{request.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{parent_of(request):016x}" == CALLER.split("-")[2]
    assert request.attributes is not None
    assert request.attributes["medsora.request_id"] == answer.headers["x-request-id"]
    assert request.attributes["http.response.status_code"] == 200

    repository: JobRepository = client.app.state.services.repository  # type: ignore[attr-defined]
    claim = repository.claim(answer.json()["id"], worker="w")
    assert claim is not None
    work = FinishedWork(artifact="a", size_bytes=1, sha256="0", sampling_s=2.0, encode_s=0.5, store_s=0.25)
    claim = replace(claim, job=replace(claim.job, queued_at=990.0, started_at=1000.0), taken_at=1000.1)
    trace_attempt(claim, "succeeded", work=work, made_s=1003.0)
    made = by_name(spans)
    attempt = made["attempt"]
    assert attempt.context is not None
    assert attempt.context.trace_id == request.context.trace_id
    assert parent_of(attempt) == request.context.span_id
    seconds = {}
    for name in ("queue", "claim", "sample", "encode", "store", "settle"):
        span = made[name]
        assert parent_of(span) == (request if name == "queue" else attempt).context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        seconds[name] = (span.start_time / 1e9, span.end_time / 1e9)
    assert seconds["queue"] == pytest.approx((990.0, 1000.0))
    assert seconds["claim"] == pytest.approx((1000.0, 1000.1))
    assert seconds["sample"] == pytest.approx((1000.25, 1002.25))
    assert seconds["encode"] == pytest.approx((1002.25, 1002.75))
    assert seconds["store"] == pytest.approx((1002.75, 1003.0))
    shown = " ".join(str(span.to_json()) for span in spans.get_finished_spans())
    assert "covid" not in shown, "what callers wrote is in no trace"


def test_an_attempt_that_fails_is_an_error(client: TestClient, spans: InMemorySpanExporter) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "covid lung"}).json()["id"]
    repository: JobRepository = client.app.state.services.repository  # type: ignore[attr-defined]
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    trace_attempt(claim, "out_of_memory")
    attempt = by_name(spans)["attempt"]
    assert attempt.status.status_code.name == "ERROR"
    assert attempt.status.description == "out_of_memory"
    assert "sample" not in by_name(spans)


def test_a_bug_is_an_error_of_the_request(
    client: TestClient, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(client.app.state.services.repository, "page", broken)  # type: ignore[attr-defined]
    assert client.get("/v1/videos").status_code == 500
    span = by_name(spans)["GET /v1/videos"]
    assert span.status.status_code.name == "ERROR"
    assert "canary" not in str(span.to_json())


def test_without_an_endpoint_nothing_is_imported_and_nothing_noted(client: TestClient) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "covid lung"}, headers={"traceparent": CALLER}).json()["id"]
    job = client.app.state.services.repository.get(job_id)  # type: ignore[attr-defined]
    assert job.traceparent is None
    program = (
        "import sys; from server import tracing; import server.app, server.worker.attempts\n"
        "tracing.start_tracing('api'); tracing.record('x', parent=None, began_s=0.0, ended_s=1.0)\n"
        "with tracing.request_span({}) as span: span.answered('GET', '/', 200); tracing.traceparent()\n"
        "tracing.stop_tracing(); print([name for name in sys.modules if name.startswith(LIBRARY)])"
    ).replace("LIBRARY", "('opentelemetry.sdk', 'opentelemetry.exporter')")  # redis looks for the API by itself
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    tracing.start_tracing("api")
    assert "medsora[otel]" in caplog.text
    assert tracing.traceparent() is None
