"""docker-compose.yml, really run: images for CPUs are built, the stack is brought up, used, hurt and taken down.

Base images are stand-ins made of Debian's packages, since no registry is needed so; Grafana has none, and is left out
(tests/deployment/test_dashboard.py checks its files).
"""

import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from containers import Stack, wait_until

from medsora.video_io import probe_video

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


@pytest.fixture(scope="module")
def key(stack: Stack, http: httpx.Client) -> str:
    return stack.make_key()


@pytest.fixture(scope="module")
def client(stack: Stack, http: httpx.Client, key: str) -> openai.OpenAI:
    """The openai client, through the proxy."""
    return openai.OpenAI(base_url=f"https://localhost:{stack.https_port}/v1", api_key=key, http_client=http)


def test_a_video_is_made_through_the_proxy(client: openai.OpenAI, tmp_path: Path) -> None:
    video: Any = client.videos.create_and_poll(
        prompt="covid lung", size="128x128", extra_body={"seed": 1, "num_inference_steps": 2}
    )
    assert (video.status, video.error) == ("completed", None)
    path = tmp_path / "clip.mp4"
    path.write_bytes(client.videos.download_content(video.id).read())
    assert probe_video(path).width == 128


def test_a_backup_is_restored(stack: Stack, client: openai.OpenAI, tmp_path: Path) -> None:
    """As docs/deployment.md tells it; into a database and a folder beside those of the stack, which goes on."""
    video: Any = client.videos.create_and_poll(
        prompt="covid lung", size="128x128", extra_body={"seed": 2, "num_inference_steps": 2}
    )
    content = client.videos.download_content(video.id).read()
    os.chown(tmp_path, 10001, 10001)
    run = ["run", "--rm", "--no-deps", "--volume", f"{tmp_path}:/backups"]
    stack.compose(*run, "reaper", "backup", "/backups/now")
    assert (tmp_path / "now" / "backup.json").is_file()
    statement = "create database restored"
    connect = "PGPASSWORD=$(cat /run/secrets/postgres_password) psql --host 127.0.0.1 --username medsora"
    stack.execute("postgres", "sh", "-c", f"{connect} --command '{statement}'")
    beside = {
        "MEDSORA_DATABASE_URL": "postgresql+psycopg://medsora@postgres:5432/restored",
        "MEDSORA_DATA_DIR": "/backups/data",
    }
    options = [word for name, value in beside.items() for word in ("-e", f"{name}={value}")]
    stack.compose(*run, *options, "reaper", "restore", "/backups/now")
    (restored,) = (tmp_path / "data").rglob(f"{video.id}*.mp4")
    assert restored.read_bytes() == content
    query = f"select status from jobs where id = '{video.id}'"
    told = stack.execute("postgres", "sh", "-c", f'{connect} restored --tuples-only --command "{query}"')
    assert told.strip() == "succeeded"


def test_keys_are_needed_and_figures_stay_within(http: httpx.Client) -> None:
    assert http.get("/v1/videos").status_code == 401
    assert http.get("/metrics").status_code == 404
    assert http.get("/health/live").status_code == 200


def test_plain_http_is_sent_to_https(stack: Stack) -> None:
    answer = httpx.get(f"http://localhost:{stack.http_port}/v1/videos?limit=2")
    assert answer.status_code == 308
    assert answer.headers["location"] == "https://localhost/v1/videos?limit=2"


def test_bodies_and_slow_clients_end_at_the_proxy(stack: Stack, http: httpx.Client, key: str) -> None:
    context = ssl.create_default_context(cafile=str(stack.certificate))
    raw = socket.create_connection(("localhost", stack.https_port), timeout=40)
    with context.wrap_socket(raw, server_hostname="localhost") as slow:
        slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        headers = {"authorization": f"Bearer {key}"}
        assert http.post("/v1/videos", content=b" " * (27 * 2**20), headers=headers).status_code == 413
        end = b"anything"
        try:
            while end:  # a request head that does not end is cut off, whatever else goes on
                end = slow.recv(4096)
        except ConnectionResetError:
            pass
        assert time.monotonic() - began < 20


def test_containers_have_no_more_than_they_need(stack: Stack) -> None:
    for service in ("proxy", "api", "reaper", "worker-cpu", "redis", "postgres", "prometheus"):
        for container in stack.containers(service):
            (about,) = json.loads(stack.engine.run("inspect", container))
            status = Path(f"/proc/{about['State']['Pid']}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, (service, fields["CapEff"])
            assert fields["NoNewPrivs"] == "1", service
            assert fields["Uid"].split()[0] != "0", service
            assert about["HostConfig"]["ReadonlyRootfs"], service
            assert about["HostConfig"]["Memory"] > 0, service
            assert about["HostConfig"]["PidsLimit"] > 0, service
            passwords = [path.read_text() for path in (stack.folder / "docker" / "secrets").glob("*_password")]
            assert not [1 for text in passwords if text in json.dumps(about)], service
            published = {port for port, host in about["NetworkSettings"]["Ports"].items() if host}
            assert published == ({"8080/tcp", "8443/tcp", "9443/tcp"} if service == "proxy" else set())
    assert len(stack.containers("api")) == 2
    assert "torch" not in stack.execute("api", "ls", "/opt/medsora/lib/python3.11/site-packages").split()
    assert json.loads(stack.execute("api", "cat", "/usr/share/sbom/medsora-api.cdx.json"))["bomFormat"] == "CycloneDX"


def test_health_checks_pass(stack: Stack) -> None:
    for service in ("proxy", "api", "reaper", "worker-cpu", "redis", "postgres", "prometheus"):
        for container in stack.containers(service):
            stack.engine.run("healthcheck", "run", container)


def test_redis_keeps_strangers_out(stack: Stack) -> None:
    assert "NOAUTH" in stack.execute("redis", "redis-cli", "ping", check=False)
    ask = 'REDISCLI_AUTH="$(cat /run/secrets/redis_password)" redis-cli --user medsora '
    assert "NOPERM" in stack.execute("redis", "sh", "-c", ask + "get anything", check=False)
    assert "NOPERM" in stack.execute("redis", "sh", "-c", ask + "config get maxmemory-policy", check=False)


def test_a_killed_worker_costs_no_job(stack: Stack, client: openai.OpenAI) -> None:
    extra = {"seed": 3, "sampler": "euler", "num_inference_steps": 100}
    video: Any = client.videos.create(prompt="covid lung", size="128x128", extra_body=extra)

    def progress() -> int:
        return client.videos.retrieve(video.id).progress

    wait_until(lambda: progress() > 0, timeout_s=120, what=lambda: f"no progress:\n{stack.logs()}")
    (worker,) = stack.containers("worker-cpu")
    os.kill(int(stack.engine.run("inspect", "--format", "{{.State.Pid}}", worker)), signal.SIGKILL)

    def ended() -> Any:
        job = client.videos.retrieve(video.id)
        return job if job.status in ("completed", "failed") else None

    done = wait_until(ended, timeout_s=600, what=lambda: f"the job does not end:\n{stack.logs()}")
    assert (done.status, done.error) == ("completed", None)
    ask = "import urllib.request as r; print(r.urlopen('http://localhost:8000/metrics').read().decode())"
    told = stack.execute("api", "/opt/medsora/bin/python", "-c", ask).splitlines()
    redelivered = [line for line in told if line.startswith("medsora_jobs_redelivered_total")]
    assert [float(line.split()[-1]) for line in redelivered] == [1.0]


def test_one_of_two_api_containers_is_enough(stack: Stack, http: httpx.Client) -> None:
    stack.engine.run("stop", "--time", "30", stack.containers("api")[0])
    answers = [http.get("/health/live").status_code for _ in range(20)]
    assert answers == [200] * 20


def test_prometheus_has_every_figure_of_the_dashboard(stack: Stack) -> None:
    """Every expression of dashboard and alerts gives something, but where there is nothing to tell (GPU, failures)."""
    context = ssl.create_default_context(cafile=str(stack.certificate))
    base = f"https://localhost:{stack.watch_port}/prometheus/api/v1"
    with httpx.Client(base_url=base, verify=context, timeout=30.0) as prometheus:

        def result(expression: str) -> list[Any]:
            answer = prometheus.post("/query", data={"query": expression}).json()
            assert answer["status"] == "success", (expression, answer)
            return list(answer["data"]["result"])

        done = 'medsora_requests_total{status="succeeded"} >= 2'
        wait_until(lambda: result(done), timeout_s=60, what=lambda: f"{done} is not true:\n{stack.logs()}")
        dashboard = json.loads((ROOT / "docker/grafana/dashboards/medsora.json").read_text())
        panels = {
            target["expr"]: panel["title"] for panel in dashboard["panels"] for target in panel.get("targets", [])
        }
        empty = {title for expression, title in panels.items() if not result(expression.replace("$model", ".*"))}
        assert empty <= {"GPU memory", "Failures and repeated attempts"}
        rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
        loaded = prometheus.get("/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in rules}
        assert {rule["health"] for rule in loaded} == {"ok"}


def test_an_idle_worker_stops_at_once_and_well(stack: Stack) -> None:
    (worker,) = stack.containers("worker-cpu")
    began = time.monotonic()
    stack.engine.run("stop", "--time", "60", worker)
    assert time.monotonic() - began < 20
    assert stack.engine.run("inspect", "--format", "{{.State.ExitCode}}", worker).strip() == "0"


def test_it_refuses_passwords_that_are_none(stack: Stack) -> None:
    command = ["run", "--rm", "--network=none", "--env", "MEDSORA_REDIS_URL=redis://redis", "--env"]
    told = stack.engine.run(*command, "MEDSORA_REDIS_PASSWORD=changeme", "medsora-api:test", "api", check=False)
    assert "MEDSORA_REDIS_PASSWORD: " in told
    assert "at least 16 characters" in told
