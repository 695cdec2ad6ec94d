"""A whole server that sends its traces to a collector of OTLP over HTTP."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from conftest import StartServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Collector(ThreadingHTTPServer):
    """Takes spans, and keeps (part of the server, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Collector)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert about["service.name"] == "medsora-server"
            for scope in resource.scope_spans:
                self.server.spans += [(about["medsora.part"], span) for span in scope.spans]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_one_trace_from_the_request_to_the_stored_video(start_server: "StartServer") -> None:
    collector = Collector()
    try:
        endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
        server = start_server(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="200")
        job_id = server.submit()
        job = server.wait_for(job_id, "succeeded")
        assert job.traceparent is not None
        trace = bytes.fromhex(job.traceparent.split("-")[1])

        def of_trace() -> dict[tuple[str, str], Any]:
            found = [(part, span) for part, span in list(collector.spans) if span.trace_id == trace]
            return {(part, span.name): span for part, span in found}

        expected = {
            ("api", "POST /v1/videos"),
            *(("worker", name) for name in ("queue", "attempt", "claim", "sample", "encode", "store", "settle")),
        }
        server.wait_until(lambda: set(of_trace()) == expected, timeout_s=30, what=lambda: str(sorted(of_trace())))
        spans = of_trace()
        request, attempt = spans["api", "POST /v1/videos"], spans["worker", "attempt"]
        assert attempt.parent_span_id == request.span_id
        assert spans["worker", "sample"].parent_span_id == attempt.span_id
        assert spans["worker", "claim"].start_time_unix_nano < spans["worker", "sample"].start_time_unix_nano
        assert spans["worker", "store"].end_time_unix_nano <= attempt.end_time_unix_nano
        assert server.stop() == 0
    finally:
        collector.shutdown()
        collector.server_close()
