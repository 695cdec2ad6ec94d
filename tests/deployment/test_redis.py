"""docker/redis: its one user may do all that Celery and the server ask of Redis, and nothing else."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry
from waiting import wait_until

from server.embedded import find_redis_server
from server.jobs.queue import QUEUE_NAME, JobQueue
from server.settings import Settings
from server.worker.celery_app import make_celery

FOLDER = Path(__file__).parents[2] / "docker" / "redis"
PASSWORD = "a-password-of-length"


@pytest.fixture(scope="module")
def broker_url() -> Iterator[str]:
    """A Redis with the settings and the user of the image, that is reached by a Unix socket."""
    (user,) = re.findall(r'echo "(user medsora .*)"', (FOLDER / "start.sh").read_text())
    settings = [line for line in (FOLDER / "redis.conf").read_text().splitlines() if line.split()[:1] != ["bind"]]
    settings = [line for line in settings if not line.startswith(("port ", "dir "))]
    with TemporaryDirectory(prefix="medsora-redis-") as folder:
        path = Path(folder) / "redis.sock"
        settings += ["port 0", f"dir {folder}", f"unixsocket {path}", "user default off"]
        (Path(folder) / "redis.conf").write_text("\n".join([*settings, user.replace("$password", PASSWORD)]) + "\n")
        command = [find_redis_server(), str(Path(folder) / "redis.conf")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            wait_until(path.exists, timeout_s=20, what="Redis does not start")
            yield f"redis+socket://medsora:{PASSWORD}@{path}"
        finally:
            process.terminate()
            process.wait(20)


def test_celery_may_do_what_it_does(broker_url: str) -> None:
    """All but the loop of a worker: its queue and its mailbox are declared, messages go through both."""
    queue = JobQueue(broker_url)
    queue.publish("video_1", 0)
    assert queue.length() == 1
    app: Celery = make_celery(Settings(redis_url=broker_url))  # type: ignore[arg-type]
    with app.connection_for_read() as connection:
        taken = connection.SimpleQueue(app.amqp.queues[QUEUE_NAME]).get(timeout=5)
        assert "video_1" in str(taken.headers)
        taken.ack()
        node = app.control.mailbox.Node("worker@here", channel=connection.channel())
        with node.listen():
            assert app.control.broadcast("nothing", connection=connection) is None
        connection.transport.cycle.maybe_refresh_binding_expiry()
    assert queue.length() == 0
    queue.close()


@pytest.mark.parametrize(
    "command",
    [("get", "anything"), ("config", "get", "maxmemory-policy"), ("flushall",), ("keys", "*"), ("acl", "list")],
)
def test_nothing_else_is_allowed(broker_url: str, command: tuple[str, ...]) -> None:
    path = broker_url.partition("@")[2]
    with redis.Redis(unix_socket_path=path, username="medsora", password=PASSWORD) as client:
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


def test_strangers_are_kept_out(broker_url: str) -> None:
    path, once = broker_url.partition("@")[2], Retry(NoBackoff(), 0)
    with redis.Redis(unix_socket_path=path, retry=once) as client, pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()
