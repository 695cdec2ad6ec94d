"""What all tests share: one seed, torch's global state put back, one tiny checkpoint, no GPU taken for granted."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medsora.threads import let_idle_threads_sleep

let_idle_threads_sleep()  # read when torch is imported: tests share few cores with the processes that they start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from s3_server import S3Server  # noqa: E402

if TYPE_CHECKING:
    from postgres_cluster import PostgresCluster

# Test processes side by side share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Seed every generator before a test, and put back what it may have changed for all others."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights that makes a 16-frame 32x32 clip in well under a second. Do not write to it."""
    from medsora.checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A PostgreSQL of our own. Whoever stops it starts it again."""
    # here, so that tests that want no database run where psycopg is missing
    from postgres_cluster import MISSING, PostgresCluster, find_programs

    programs = find_programs()
    if programs is None:
        pytest.skip(MISSING)
    cluster = PostgresCluster(programs)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. Make a bucket of your own in it."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what may take longest begin first, so that no process is left with it; skip what needs a GPU without one."""
    longest = {item: float(marker.args[0]) for item in items if (marker := item.get_closest_marker("timeout"))}
    items.sort(key=lambda item: -longest.get(item, 0.0))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
