"""Podman, as root and without a registry: base images from Debian's packages, the project's images, and the stack."""

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import waiting
from ports import free_ports

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / "deployment" / "stand_ins"
BASE = "docker.io/library/debian:bookworm-slim"
STAND_IN_IMAGES = {
    "python": "docker.io/library/python:3.11-slim-bookworm",
    "redis": "docker.io/library/redis:7-bookworm",
    "postgres": "docker.io/library/postgres:15-bookworm",
    "prometheus": "docker.io/prom/prometheus:v2.53.5",
}
ENGINE_CONF = """
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=8192:8192"]
[engine]
runtime = "runc"
"""
SWITCH = "MEDSORA_TEST_CONTAINERS"

wait_until = partial(waiting.wait_until, every_s=0.5)
"""What is asked here costs the containers more than a look at a file."""


def missing_for_containers() -> str | None:
    """Why no container can be built and run here; None: nothing is missing."""
    if os.environ.get(SWITCH) != "1":
        return f"takes minutes and a gigabyte of downloads; {SWITCH}=1 asks for it"
    if os.geteuid() != 0:
        return "makes base images with debootstrap, as root"
    missing = [program for program in ("podman", "runc", "debootstrap", "openssl") if shutil.which(program) is None]
    return f"needs {', '.join(missing)}" if missing else None


class Engine:
    """Podman with its own configuration.

    Args:
        folder: For configuration files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text(ENGINE_CONF)
        self.environment = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        self.seconds: dict[str, float] = {}

    def run(self, *arguments: str, timeout_s: float = 600, check: bool = True) -> str:
        """Run podman and return what it prints."""
        return self._run(["podman", *arguments], timeout_s=timeout_s, check=check)

    def _run(self, command: Sequence[str], *, timeout_s: float, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr if not check else done.stdout

    def has_image(self, name: str) -> bool:
        """Whether there is an image of this name."""
        return subprocess.run(["podman", "image", "exists", name], env=self.environment, check=False).returncode == 0

    def make_base(self) -> None:
        """The image of Debian that all others stand on, by debootstrap; one that is there is kept."""
        if self.has_image(BASE):
            return
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="medsora-debian-") as folder:
            packages = "ca-certificates,python3,python3-venv"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder]
            self._run(command, timeout_s=1200)
            with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as archive:
                subprocess.run(
                    ["podman", "import", "-q", "-", BASE],
                    stdin=archive.stdout,
                    env=self.environment,
                    check=True,
                    capture_output=True,
                )
        self.seconds["debian"] = time.monotonic() - began

    def build(self, name: str, dockerfile: Path, *, context: Path, options: Sequence[str] = ()) -> None:
        """Build an image, with the machine's network and pip's configuration of this machine."""
        began = time.monotonic()
        command = ["build", "--runtime", "/usr/sbin/runc", "--network=host", "--format=docker", "-t", name]
        self.run(*command, *options, "-f", str(dockerfile), str(context), timeout_s=2400)
        self.seconds[name.rpartition("/")[2]] = time.monotonic() - began

    def pip_options(self) -> list[str]:
        """Options of a build by which pip finds what it finds here: indexes, folders of wheels, certificates."""
        lines = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        kept = {"index-url", "extra-index-url", "find-links", "cert", "trusted-host"}
        config: dict[str, str] = {}
        folders: set[str] = set()
        for line in lines:
            key, _, value = line.partition("=")
            name = key.rpartition(".")[2]
            if name in kept:
                words = value.strip("'").split()
                if name == "extra-index-url":  # an index in a folder may lead out of it
                    words = [word for word in words if not word.startswith("file:")]
                config[name] = " ".join(words)
                folders |= {word for word in words if word.startswith("/") and Path(word).exists()}
        file = self.folder / "pip.conf"
        text = "\n".join(f"{name} = {value}" for name, value in config.items() if value)
        file.write_text(f"[global]\ntimeout = 120\n{text}\n")
        return ["--secret", f"id=pip_config,src={file}", *[f"--volume={folder}:{folder}:ro" for folder in folders]]


class Stack:
    """The compose file, brought up under a name of its own from a copy of its folder.

    Args:
        engine: Podman.
        folder: Where the copy goes.
        settings: Lines for .env, over those of .env.example.
    """

    def __init__(self, engine: Engine, folder: Path, settings: dict[str, str]) -> None:
        self.engine, self.folder = engine, folder
        self.name = f"medsora-test-{os.getpid()}"
        self.http_port, self.https_port, self.watch_port = free_ports(3)
        # a limit of the file displaces all that podman was told to set by itself, and runc may not raise what is left
        text = (ROOT / "docker-compose.yml").read_text()
        (folder / "docker-compose.yml").write_text(text.replace("ulimits: {", "ulimits: {nproc: 8192, "))
        shutil.copy(ROOT / ".env.example", folder)
        shutil.copytree(ROOT / "docker", folder / "docker", ignore=shutil.ignore_patterns("secrets", "acme"))
        subprocess.run([folder / "docker" / "configure.sh", "localhost"], check=True, capture_output=True)
        ports = {"HTTP_PORT": self.http_port, "HTTPS_PORT": self.https_port, "WATCH_PORT": self.watch_port}
        given = {"COMPOSE_PROFILES": "cpu", **settings, **{name: str(port) for name, port in ports.items()}}
        kept = [line for line in (folder / ".env").read_text().splitlines() if line.partition("=")[0] not in given]
        lines = [f"{name}={value}" for name, value in given.items()]
        (folder / ".env").write_text("\n".join([*kept, *lines]) + "\n")
        self.certificate = folder / "docker" / "secrets" / "tls_certificate"

    def compose(self, *arguments: str, timeout_s: float = 600, check: bool = True) -> str:
        """Run podman-compose on the file."""
        command = [str(Path(sys.executable).with_name("podman-compose")), "-p", self.name, *arguments]
        return self.engine._run(command, timeout_s=timeout_s, check=check, cwd=self.folder)

    def containers(self, service: str) -> list[str]:
        """Ids of the running containers of a service."""
        label = f"label=com.docker.compose.service={service}"
        project = f"label=com.docker.compose.project={self.name}"
        return self.engine.run("ps", "-q", "--filter", label, "--filter", project).split()

    def execute(self, service: str, *command: str, check: bool = True) -> str:
        """Run a command in the first container of a service."""
        return self.engine.run("exec", self.containers(service)[0], *command, check=check)

    def logs(self, lines: int = 30) -> str:
        """The last words of every container, also of those that have ended."""
        project = f"label=com.docker.compose.project={self.name}"
        names = self.engine.run("ps", "-a", "--format", "{{.Names}} {{.Status}}", "--filter", project).splitlines()
        told = []
        for line in names:
            name = line.split()[0]
            told.append(f"---- {line}\n{self.engine.run('logs', '--tail', str(lines), name, check=False)}")
        return "\n".join(told)

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client of the proxy that trusts the certificate of the stack, once a video could be made."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        with httpx.Client(base_url=f"https://localhost:{self.https_port}", verify=context, timeout=60.0) as client:

            def is_ready() -> bool:
                try:
                    return client.get("/health/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_ready, timeout_s=600, what=lambda: "the stack is not ready:\n" + self.logs())
            yield client

    def make_key(self) -> str:
        """A key, made as the documentation tells."""
        told = self.execute("api", "medsora-server", "keys", "create", "--name", "test", "--tenant", "test")
        return next(word for word in told.split() if word.startswith("medsora_"))
