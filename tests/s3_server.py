"""A real S3 server for tests (moto's, in a process of its own), with ways to hurt it."""

import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

__all__ = ["CREDENTIALS", "S3Server"]

CREDENTIALS = {"s3_access_key_id": "medsora", "s3_secret_access_key": "medsora-secret", "s3_region": "eu-central-1"}
_NUMBERS = itertools.count(1)


class S3Server:
    """Starts it; :meth:`close` ends it.

    Args:
        log: File for what it says.
    """

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, with no buckets."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))},
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._ask("GET", "/moto-api/")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"no S3 server: {self._log.read_text()[-2000:]}") from None
                time.sleep(0.05)

    def client(self) -> Any:
        """A client of boto3."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=CREDENTIALS["s3_access_key_id"],
            aws_secret_access_key=CREDENTIALS["s3_secret_access_key"],
            region_name=CREDENTIALS["s3_region"],
        )

    def make_bucket(self) -> str:
        """A new bucket; returns its name."""
        name = f"medsora-test-{next(_NUMBERS)}"
        self.client().create_bucket(
            Bucket=name, CreateBucketConfiguration={"LocationConstraint": CREDENTIALS["s3_region"]}
        )
        return name

    def settings(self, bucket: str) -> dict[str, Any]:
        """Fields of Settings by which the server keeps its files in a bucket."""
        return {"storage_url": f"s3://{bucket}/medsora", "s3_endpoint_url": self.url, **CREDENTIALS}

    def refuse(self, *, everything: bool) -> None:
        """Answer every request as one without rights, or none."""
        self._ask("POST", "/moto-api/reset-auth", b"0" if everything else b"inf")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> None:
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers={"content-type": "text/plain"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            answer.read()

    def close(self) -> None:
        """End it; what it held is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
