"""What docker-compose.yml, the Dockerfiles and .env.example must hold, whatever they say else. Runs nothing."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, FILE_SUFFIX, Settings
from server.settings_reference import ENV_MARK, describe_settings, env_lines, markdown_page

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").rglob("*Dockerfile"))
EXAMPLE = (ROOT / ".env.example").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    user = service["user"].split(":")[0]
    assert user.isdigit()
    assert user != "0"
    assert not {"pid", "ipc", "network_mode", "devices"} & set(service) or service.get("network_mode") == "none"
    assert service["restart"] in ("unless-stopped", "no")


@pytest.mark.parametrize("name", SERVICES)
def test_volumes_are_named_or_read_only_parts_of_this_folder(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, rest = volume.partition(":")
        assert "docker.sock" not in volume
        assert source in COMPOSE["volumes"] or rest.endswith(":ro"), volume


def test_nothing_but_the_proxy_is_published() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    watch = [port for port in SERVICES["proxy"]["ports"] if port.endswith(":9443")]
    assert [port.startswith("127.0.0.1:") for port in watch] == [True]


def test_networks_are_internal_where_nobody_goes_out() -> None:
    outward = {name for name, network in COMPOSE["networks"].items() if not network.get("internal")}
    assert {name for name, service in SERVICES.items() if outward & set(service.get("networks", []))} == {
        "proxy",  # is published
        "reaper",  # sends webhooks
    }
    data = {name for name, service in SERVICES.items() if "data" in service.get("networks", [])}
    assert not {"proxy", "prometheus", "grafana", "tensorboard"} & data
    assert {"redis", "postgres"} <= data
    assert SERVICES["redis"]["networks"] == SERVICES["postgres"]["networks"] == ["data"]


def test_no_secret_is_in_the_file_and_each_is_a_file() -> None:
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    for name, service in SERVICES.items():
        for variable, value in (service.get("environment") or {}).items():
            is_secret = re.search(r"PASSWORD|SECRET|TOKEN", variable)
            assert not is_secret or str(value).startswith("/run/secrets/"), (name, variable)
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_every_process_has_a_health_check() -> None:
    checked = set(re.findall(r"^FROM runtime(?:-cuda)? AS (?!runtime)(\S+)", _text("docker/Dockerfile"), re.MULTILINE))
    assert _text("docker/Dockerfile").count("HEALTHCHECK") == len(checked)
    for name, service in SERVICES.items():
        own = "build" in service and name not in ("training", "tensorboard")
        assert own or "healthcheck" in service or name in ("training", "tensorboard"), name


def test_workers_have_longer_to_stop_than_they_take() -> None:
    defaults = Settings(redis_url="redis://none")  # type: ignore[arg-type]
    for name, service in SERVICES.items():
        if name.startswith("worker"):
            grace_s = int(service["stop_grace_period"].removesuffix("s"))
            assert grace_s >= defaults.drain_s + 60


def test_one_worker_a_gpu() -> None:
    for count, profile in ((1, "gpu"), (2, "gpu-2"), (4, "gpu-4"), (8, "gpu-8")):
        workers = [service for service in SERVICES.values() if profile in service.get("profiles", [])]
        devices = [worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"][0] for worker in workers]
        assert devices == [str(number) for number in range(count)]
    assert [name for name, service in SERVICES.items() if "cpu" in service.get("profiles", [])] == ["worker-cpu"]
    assert SERVICES["api"]["deploy"]["replicas"] == 2


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_images_are_small_honest_and_run_as_nobody(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^FROM (\S+)(?: AS (\S+))?", text, re.MULTILINE)
    stages = {stage for _, stage in bases if stage}
    arguments = dict(re.findall(r"^ARG ([A-Z0-9_]+)=(\S*)", text.partition("\nFROM ")[0], re.MULTILINE))
    for base, _ in bases:
        match = re.fullmatch(r"\$\{(\w+)\}", base)
        assert base in stages or (match and match.group(1) in arguments), f"{base} is no build argument"
    for value in arguments.values():
        assert value in stages or re.fullmatch(r"[a-z0-9./-]+:[\w.-]+", value), value
        assert not value.endswith(":latest")
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users
    assert all(re.fullmatch(r"[1-9]\d+:[1-9]\d+", user) for user in users)
    assert "HEALTHCHECK" in text
    assert "org.opencontainers.image.licenses" in text
    assert "ADD " not in text
    assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", text), "an address is a build argument"
    assert not re.search(r"ARG \w*(TOKEN|PASSWORD|SECRET)", text)


def test_the_same_images_are_named_everywhere() -> None:
    compose = set(re.findall(r"(\w+_IMAGE):-(\S+?)\}", _text("docker-compose.yml")))
    example = set(re.findall(r"^(\w+_IMAGE)=(\S+)$", EXAMPLE, re.MULTILINE))
    assert compose == example
    for path in DOCKERFILES:
        for name, value in re.findall(r"^ARG (\w+_IMAGE)=(\S+)", path.read_text(), re.MULTILINE):
            assert (name, value) in compose, path


def test_every_variable_of_the_compose_file_is_in_the_example_with_the_same_default() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", re.sub(r"^\s*#.*$", "", _text("docker-compose.yml"), flags=re.M)))
    given = dict(line.split("=", 1) for line in EXAMPLE.splitlines() if "=" in line and not line.startswith("#"))
    wanted = {name: default for name, default in used.items() if not name.startswith(ENV_PREFIX)}
    paths = {"TLS_CERTIFICATE", "TLS_KEY"}  # in the folder of secrets, by default
    assert set(wanted) | paths | {"COMPOSE_PROFILES"} == set(given) | paths
    assert {name: value for name, value in given.items() if name != "COMPOSE_PROFILES"} == wanted | {
        name: given[name] for name in paths
    }


def test_example_and_page_are_those_of_the_code() -> None:
    assert EXAMPLE.partition(ENV_MARK)[2] == env_lines().partition(ENV_MARK)[2], "run ./run settings"
    assert _text("docs/settings.md") == markdown_page(), "run ./run settings"


def test_every_setting_is_described_once_with_its_default() -> None:
    described = list(describe_settings())
    assert [one.variable for one in described] == [ENV_PREFIX + name.upper() for name in Settings.model_fields]
    by_name = {one.variable: one for one in described}
    assert by_name["MEDSORA_PORT"].default == "8000"
    assert by_name["MEDSORA_PORT"].kind == "integer, at least 0, at most 65 535"
    assert by_name["MEDSORA_CHECKPOINTS"].default == "lung-ultrasound-small"
    assert by_name["MEDSORA_WARM_UP"].kind == "`true` or `false`"
    assert by_name["MEDSORA_KEYS"].kind == "one of `auto`, `required`, `off`"
    secrets = {one.variable for one in described if one.is_secret}
    assert {"MEDSORA_REDIS_PASSWORD", "MEDSORA_DATABASE_PASSWORD"} <= secrets


def test_variables_of_containers_are_settings() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for service in SERVICES.values():
        for variable in service.get("environment") or {}:
            if variable.startswith(ENV_PREFIX):
                assert variable in known or variable.removesuffix(FILE_SUFFIX) in known


def test_configure_makes_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    for name in (".env.example", "docker/configure.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = ["sh", str(tmp_path / "docker" / "configure.sh"), "clips.example.org"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    secrets = tmp_path / "docker" / "secrets"
    made = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert set(made) | {"pip_config"} == set(COMPOSE["secrets"])
    assert all(len(value) == 40 for name, value in made.items() if not name.startswith("tls"))
    assert len(set(made.values())) == len(made)
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert re.search(r"^COMPOSE_PROFILES=(cpu|gpu(-[248])?)$", (tmp_path / ".env").read_text(), re.MULTILINE)
    assert "clips.example.org" in first
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert again == ""
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == made


def test_locks_are_of_these_requirements() -> None:
    """Every version that constraints.txt names is the one in the locks, and every line has a hash."""
    constraints = _pins(_text("constraints.txt"))
    for path in sorted((ROOT / "docker" / "locks").glob("*.txt")):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines), path
        pins = _pins(path.read_text())
        different = {name: (pins[name], constraints[name]) for name in pins.keys() & constraints.keys()}
        assert {name for name, (one, other) in different.items() if one != other} == set(), path


@pytest.mark.parametrize(("lock", "extras"), [("api", "server"), ("worker", "worker"), ("training", "training")])
def test_locks_hold_what_the_extras_name(lock: str, extras: str) -> None:
    import tomllib

    groups = tomllib.loads(_text("pyproject.toml"))["project"]["optional-dependencies"]
    pins = _pins(_text(f"docker/locks/{lock}.txt"))

    def names(group: str) -> set[str]:
        found = set()
        for requirement in groups[group]:
            if match := re.match(r"medsora\[(.+)\]", requirement):
                found |= set().union(*[names(part) for part in match.group(1).split(",")])
            else:
                found.add(_normal(re.split(r"[\[<>=;, ]", requirement)[0]))
        return found

    assert names(extras) - {"torch"} <= set(pins)


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(text: str) -> dict[str, str]:
    return {_normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
