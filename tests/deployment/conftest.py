"""Podman, and the stack of docker-compose.yml in it; what they are made of is in tests/containers.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from containers import ROOT, STAND_IN_IMAGES, STAND_INS, Engine, Stack, missing_for_containers


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Podman with every image of the stack for CPUs, built from this checkout."""
    if reason := missing_for_containers():
        pytest.skip(reason)
    engine = Engine(tmp_path_factory.mktemp("engine"))
    engine.make_base()
    for stand_in, image in STAND_IN_IMAGES.items():
        engine.build(image, STAND_INS / f"{stand_in}.Dockerfile", context=STAND_INS)
    pip = engine.pip_options()
    for target in ("api", "worker-cpu"):
        options = [*pip, "--target", target]
        engine.build(f"medsora-{target}:test", ROOT / "docker" / "Dockerfile", context=ROOT, options=options)
    engine.build("medsora-proxy:test", ROOT / "docker" / "proxy" / "Dockerfile", context=ROOT)
    return engine


SETTINGS = {
    "IMAGE_TAG": "test",
    "LOG_DRIVER": "k8s-file",
    "WORKER_MEMORY": "4g",
    "MEDSORA_LEASE_S": "8",
    "MEDSORA_HEARTBEAT_S": "2",
    "MEDSORA_REAPER_INTERVAL_S": "1",
    "MEDSORA_WARM_UP": "false",
    "MEDSORA_BATCH_SIZES": "1",
}
SERVICES = ["proxy", "api", "reaper", "worker-cpu", "redis", "postgres"]


@contextmanager
def running(stack: Stack, services: Sequence[str]) -> Iterator[Stack]:
    """Bring services of a stack up, and take them down."""
    try:
        stack.compose("up", "--detach", "--no-build", *services)
        yield stack
    finally:
        stack.compose("down", "--volumes", check=False)


@pytest.fixture(scope="module")
def stack(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole service for CPUs, but Grafana, of which there is no image here."""
    with running(Stack(engine, tmp_path_factory.mktemp("stack"), SETTINGS), [*SERVICES, "prometheus"]) as stack:
        yield stack


@pytest.fixture(scope="module")
def stack_with_bucket(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The same with its profile s3, where videos go into a bucket."""
    engine.build(
        "docker.io/versity/versitygw:v1.0.18",
        STAND_INS / "s3.Dockerfile",
        context=STAND_INS,
        options=engine.pip_options(),
    )
    engine.build("medsora-s3:test", ROOT / "docker" / "s3" / "Dockerfile", context=ROOT)
    settings = {
        **SETTINGS,
        "COMPOSE_PROFILES": "cpu,s3",
        "MEDSORA_STORAGE_URL": "s3://medsora/",
        "MEDSORA_S3_ENDPOINT_URL": "http://s3:7070",
        "MEDSORA_S3_REGION": "us-east-1",
        "MEDSORA_S3_ACCESS_KEY_ID": "medsora",
        "MEDSORA_S3_SECRET_ACCESS_KEY_FILE": "/run/secrets/s3_secret_access_key",
    }
    with running(Stack(engine, tmp_path_factory.mktemp("stack"), settings), [*SERVICES, "s3"]) as stack:
        yield stack
