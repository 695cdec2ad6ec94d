"""What the operator decides: environment variables ``MEDSORA_*``, read here and nowhere else.

Nothing happens at import. An unknown ``MEDSORA_*`` variable is an error, so that a misspelt limit cannot
silently leave the default in force.
"""

import base64
import difflib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

__all__ = [
    "ENV_PREFIX",
    "FILE_SUFFIX",
    "Settings",
    "SettingsError",
    "get_settings",
    "is_sealing_key",
    "secret_files",
    "trace_service",
]

ENV_PREFIX = "MEDSORA_"
FILE_SUFFIX = "_FILE"
"""``MEDSORA_X_FILE`` names a file whose text is the value of the secret setting ``MEDSORA_X``."""
_MIB = 2**20
_LEAST_PASSWORD_CHARACTERS = 16
_PLACEHOLDERS = ("changeme", "change-me", "change_me", "password", "placeholder")


class SettingsError(ValueError):
    """A ``MEDSORA_*`` variable that is unknown or has a value that does not do; the message names it."""


class Settings(BaseSettings):
    """All settings of all server processes. Frozen: a process is configured once.

    Build it with :func:`get_settings` (environment) or by keyword (tests).
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", validate_default=True)

    data_dir: Path = Field(
        Path("medsora-data"),
        description="Folder of everything the server keeps: database, videos, lock, embedded Redis socket.",
    )
    database_url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL of the job database (sqlite or postgresql). None: SQLite in data_dir.",
    )
    database_password: SecretStr | None = Field(
        None, description="Password for database_url, which then names none: at least 16 characters."
    )
    storage_url: str | None = Field(
        None,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()/-]*)?$",
        description="Bucket that videos, files, sources and datasets are kept in: s3://bucket or s3://bucket/prefix; "
        "data_dir is then only for what is being written. None: folders of data_dir. Needs the extra s3.",
    )
    s3_endpoint_url: str | None = Field(
        None,
        pattern=r"^https?://[^/]+",
        description="Address of a store that is not Amazon's, by which servers reach it.",
    )
    s3_public_endpoint_url: str | None = Field(
        None,
        pattern=r"^https?://[^/]+",
        description="Address by which clients reach the store, for redirected downloads. None: s3_endpoint_url.",
    )
    s3_region: str | None = Field(None, min_length=1, description="Region of the bucket. None: as boto3 finds it.")
    s3_access_key_id: str | None = Field(
        None, min_length=1, description="Credentials of the bucket. None: as boto3 finds them (AWS_*, files, roles)."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Set with s3_access_key_id.")
    s3_downloads: Literal["proxy", "redirect"] = Field(
        "proxy",
        description="How clients get what is in the bucket. proxy: through the API; redirect: by a signed link to it, "
        "good for s3_link_s (archives of datasets always come through the API).",
    )
    s3_link_s: int = Field(
        300, ge=10, le=604_800, description="Seconds for which the link of a redirected download is good."
    )
    s3_timeout_s: float = Field(
        20.0, ge=0.5, le=600.0, description="Seconds that the store may keep silent; a request is tried three times."
    )
    redis_url: SecretStr | None = Field(
        None,
        description="URL of the Redis broker, e.g. redis://host:6379/0. None: `serve` starts its own.",
    )
    redis_password: SecretStr | None = Field(
        None, description="Password for redis_url, which then names none: at least 16 characters."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port of the API; 0 takes a free one.")
    api_processes: int = Field(
        0,
        ge=0,
        le=64,
        description="API processes that `serve` starts, which share the port. 0: one for every four cores that it may "
        "run on, 1 to 8 (a quota of a container is not seen).",
    )
    keys: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Whether callers need a key. auto: yes, unless `serve` listens on loopback alone and no key was "
        "ever made; off: nobody does, for a server behind a gateway that lets in nobody else.",
    )
    secrets_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        max_length=16,
        description="What secrets of webhooks are sealed with in the database: 32 random bytes in URL-safe base64. Of "
        "several, separated by commas, the first seals and all open. Empty: the file secrets.key in data_dir, which "
        "is made at first use.",
    )
    checkpoints: Annotated[tuple[str, ...], NoDecode] = Field(
        ("lung-ultrasound-small",),
        min_length=1,
        description="Checkpoints to serve, separated by commas: names of shipped ones, or directories. "
        "The first is the default model.",
    )

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Device that the worker samples on.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Number format of the sampler.")
    backend: str = Field("auto", min_length=1, description="Back end of the state-space operator.")
    compiled: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the networks are compiled and their calls recorded as CUDA graphs. auto: on a GPU where "
        "that can be done, else a warning is logged; on: or the model is refused; off: never.",
    )
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], NoDecode] = Field(
        (),
        max_length=16,
        description="Numbers of clips sampled at once that the networks are compiled for, rising, separated by commas; "
        "the largest is the most that a worker takes. Empty: 1,4,16,64 on a GPU and 1,2,4,8 on a CPU, of which the "
        "worker takes what it measures to pay when it starts.",
    )
    batch_wait_ms: int = Field(
        10,
        ge=0,
        le=10_000,
        description="Milliseconds that a batch which is not full waits for more jobs of its kind, where several came "
        "within the last second.",
    )
    worker_processes: int = Field(
        1, ge=1, le=64, description="Sampling processes of one worker; each holds its own copy of the model."
    )
    encoder_processes: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Processes that encode and store the clips of a sampling process. 0: its own threads do it, which "
        "slows the sampler down. None: one for each core that a sampling process has, from 1 to 32.",
    )
    worker_max_memory_mib: int = Field(
        8192,
        ge=256,
        description="MiB of host memory after which a sampling process is replaced once its job is done (leak stop).",
    )
    warm_up: bool = Field(
        True,
        description="Generate clips of the warm_up_shapes before a worker reports that it is ready, in each of "
        "batch_sizes where the networks are compiled; else the first jobs wait for what that takes.",
    )
    warm_up_shapes: Literal["default", "all"] = Field(
        "default",
        description="Shapes to warm up for. default: of a request that names none; all: every size, length and sampler "
        "of each checkpoint, with and without guidance.",
    )
    worker_start_limit_s: int = Field(
        1800,
        ge=10,
        le=86400,
        description="Seconds after which a sampling process that still loads, compiles and warms up ends, and another "
        "is started; what it has compiled is kept.",
    )

    max_queued_jobs: int = Field(
        1000, ge=1, le=1_000_000, description="Jobs that may wait at once; more are answered with 429."
    )
    tenant_clips_per_day: int | None = Field(
        None, ge=0, description="Clips that a tenant may ask for on a day (UTC); None: any number."
    )
    tenant_megapixel_frames_per_day: float | None = Field(
        None,
        ge=0.0,
        description="Megapixel-frames (width x height x frames / 1e6) that a tenant may ask for on a day (UTC).",
    )
    tenant_queued_jobs: int | None = Field(
        None, ge=0, description="Jobs of one tenant that may wait at once; None: as many as wait in all."
    )
    tenant_requests_per_minute: int | None = Field(
        None, ge=0, description="Requests that a tenant may make in a minute; None: any number."
    )
    max_attempts: int = Field(
        3, ge=1, le=10, description="Runs that a job may start before it fails with attempts_exhausted."
    )
    lease_s: float = Field(
        60.0, ge=1.0, le=3600.0, description="Seconds that a worker owns a job without renewing its claim."
    )
    heartbeat_s: float = Field(
        15.0, gt=0.0, le=600.0, description="Seconds between renewals of a lease, at least twice a lease."
    )
    progress_interval_s: float = Field(
        0.02,
        ge=0.0,
        le=10.0,
        description="Least seconds between two writes of progress, which also ask whether the job was cancelled; "
        "more where a write takes more than a tenth of that, up to 1 or the heartbeat. Steps that take longer are each "
        "written.",
    )
    reaper_interval_s: float = Field(5.0, gt=0.0, le=300.0, description="Seconds between two sweeps of the reaper.")
    publish_grace_s: float = Field(
        2.0, gt=0.0, le=300.0, description="Seconds until the reaper publishes a job that the API did not."
    )
    republish_after_s: float = Field(
        10.0, gt=0.0, le=3600.0, description="Seconds until a job that still waits may be published once more."
    )
    orphan_scan_s: float = Field(
        60.0, gt=0.0, le=86400.0, description="Seconds between two searches for files that belong to no job."
    )
    worker_heartbeat_s: float = Field(
        2.0, gt=0.0, le=60.0, description="Seconds between two signs of life of a sampling process."
    )
    job_time_limit_s: int = Field(
        3600, ge=10, le=6600, description="Seconds after which a run is ended by force; asked to end 10 % sooner."
    )
    drain_s: float = Field(
        5.0,
        ge=0.0,
        le=600.0,
        description="Seconds that a worker which is told to stop goes on with the clips that it is sampling; what is "
        "not done then is handed back, and made by another worker from the beginning. An API gets as long for requests "
        "that are under way, but at least 5.",
    )
    stop_grace_s: float = Field(
        20.0,
        gt=0.0,
        le=600.0,
        description="Seconds that a part of `serve` gets to stop before it is killed; above drain_s, for what was "
        "sampled must be stored, too.",
    )
    restart_pause_s: float = Field(
        10.0,
        ge=0.2,
        le=600.0,
        description="Longest pause before `serve` starts a part again that has died; the first is of 0.2 s, and each "
        "that follows within half a minute twice as long.",
    )

    events_interval_s: float = Field(
        0.2, gt=0.0, le=10.0, description="Seconds between two looks of an API process for events, while some listen."
    )
    events_heartbeat_s: float = Field(
        15.0, gt=0.0, le=300.0, description="Seconds of silence after which a stream of events says that it is alive."
    )
    events_kept_s: float = Field(
        86_400.0, ge=60.0, le=31_536_000.0, description="Seconds for which events can be asked for again."
    )
    events_max_rows: int = Field(
        1_000_000, ge=1000, le=100_000_000, description="Most events that are kept, whatever their age."
    )
    stream_interval_s: float = Field(
        0.2, gt=0.0, le=10.0, description="Seconds between two looks for more of a video that is watched as it is made."
    )
    stream_wait_s: float = Field(
        60.0, gt=0.0, le=3600.0, description="Seconds that a stream waits for the first frames of a video, then a 409."
    )
    max_event_streams: int = Field(
        5000, ge=1, le=20_000, description="Streams of events that one API process serves at once; more get a 429."
    )
    preview_interval_s: float = Field(
        1.0,
        ge=0.0,
        le=60.0,
        description="Least seconds between two pictures of the running estimate, for jobs whose previews somebody "
        "follows; 0: none are ever made.",
    )

    webhook_private_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts, separated by commas, that webhooks may be sent to although their address is private, as "
        "within one's own network; *: all. Others must be public.",
    )
    webhook_interval_s: float = Field(
        0.5, gt=0.0, le=60.0, description="Seconds between two looks for webhooks that are to be sent."
    )
    webhook_first_retry_s: float = Field(
        5.0,
        gt=0.0,
        le=3600.0,
        description="Seconds after which a webhook is sent again; grows 2.5-fold, up to 8 hours.",
    )
    webhook_max_attempts: int = Field(
        12, ge=1, le=50, description="Attempts at one message of a webhook before it is given up."
    )
    webhook_kept_s: float = Field(
        604_800.0, ge=60.0, le=31_536_000.0, description="Seconds for which the log of ended deliveries is kept."
    )

    keep_lossless: bool = Field(
        True,
        description="Whether each video is also kept exact to the bit (FFV1), some 15 to 25 times the size of its MP4: "
        "what variant=lossless and variant=dicom are made from. Clips of datasets have files of their own.",
    )
    playground: bool = Field(
        True, description="Whether the API serves the playground, a page for browsers, at / and its reference at /docs."
    )
    video_kept_s: float | None = Field(
        None,
        ge=60.0,
        le=315_360_000.0,
        description="Seconds after its end after which a video goes by itself, with its files and row. None: never.",
    )
    c2pa_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate that files are signed with, and those above it but the root, for "
        "C2PA manifests. Set with c2pa_private_key.",
    )
    c2pa_private_key: Path | None = Field(None, description="PEM file (PKCS #8) with the key of c2pa_certificate.")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="Signature algorithm of that key."
    )

    max_body_bytes: int = Field(
        25 * _MIB, ge=1024, le=1024 * _MIB, description="Largest request body in bytes; more is answered with 413."
    )
    max_file_bytes: int = Field(
        200 * _MIB, ge=1024, le=4096 * _MIB, description="Largest file in bytes that is taken at /v1/files."
    )
    batch_queued_jobs: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Jobs of batches that may wait for a worker at once, all batches together, and never more than "
        "half of max_queued_jobs; further lines are submitted as these are done.",
    )
    batch_queued_s: float = Field(
        5.0,
        gt=0.0,
        le=3600.0,
        description="Jobs of batches that wait are no more than were done in the last so many seconds, and at least 8: "
        "a request that somebody waits for is not long behind them.",
    )
    batch_interval_s: float = Field(
        1.0, gt=0.0, le=60.0, description="Seconds between two looks at batches that have nothing to do at the moment."
    )
    max_active_batches: int = Field(
        100, ge=1, le=10_000, description="Batches of one tenant that may be unfinished; more are answered with 429."
    )
    max_active_datasets: int = Field(
        20, ge=1, le=1000, description="Datasets of one tenant that may be unfinished; more are answered with 429."
    )
    min_free_bytes: int = Field(
        128 * _MIB, ge=0, description="Free bytes on the disk of data_dir below which no job is taken or started."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the log: lines of text, or one JSON object a line."
    )

    @field_validator("checkpoints", "batch_sizes", "webhook_private_hosts", "secrets_keys", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a checkpoint is named twice")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _check_batch_sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"must rise from each number to the next, such as 1,2,4; got {','.join(map(str, value))}")
        return value

    @field_validator("secrets_keys")
    @classmethod
    def _check_secrets_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(is_sealing_key(key.get_secret_value()) for key in value):
            raise ValueError("each key must be 32 random bytes in URL-safe base64, which are 44 characters")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            scheme = value.get_secret_value().partition("://")[0]
            if scheme not in ("redis", "rediss", "redis+socket"):
                raise ValueError("must start with redis://, rediss:// or redis+socket://")
        return value

    @field_validator("database_url")
    @classmethod
    def _check_database_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("sqlite:///", "postgresql")):
            raise ValueError("must start with sqlite:/// or postgresql")
        return value

    @field_validator("redis_password", "database_password")
    @classmethod
    def _check_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if len(text) < _LEAST_PASSWORD_CHARACTERS:
                raise ValueError(f"must have at least {_LEAST_PASSWORD_CHARACTERS} characters, has {len(text)}")
            if any(word in text.lower() for word in _PLACEHOLDERS):
                raise ValueError(f"is a placeholder (contains one of {', '.join(_PLACEHOLDERS)}); make a random one")
        return value

    @model_validator(mode="after")
    def _check_relations(self) -> "Settings":
        for name in ("redis", "database"):
            url, password = getattr(self, f"{name}_url"), getattr(self, f"{name}_password")
            if password is None:
                continue
            if url is None:
                raise ValueError(f"{name}_password needs a {name}_url")
            if _url_password(url.get_secret_value()) is not None:
                raise ValueError(f"{name}_password is set, and {name}_url names a password, too")
        if self.heartbeat_s > self.lease_s / 2:
            raise ValueError(f"heartbeat_s ({self.heartbeat_s:g}) must be at most half of lease_s ({self.lease_s:g})")
        if self.drain_s >= self.stop_grace_s:
            raise ValueError(f"drain_s ({self.drain_s:g}) must be less than stop_grace_s ({self.stop_grace_s:g})")
        if (self.c2pa_certificate is None) != (self.c2pa_private_key is None):
            raise ValueError("c2pa_certificate and c2pa_private_key must be set together")
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key must be set together")
        return self

    @property
    def database_address(self) -> str:
        """SQLAlchemy URL of the database, password included."""
        if self.database_url is not None:
            return _with_password(self.database_url, self.database_password)
        return f"sqlite:///{self.data_dir.resolve() / 'medsora.db'}"

    @property
    def turn_s(self) -> float:
        """Seconds after which a sampling process begins no further batch within one task of Celery."""
        return min(60.0, self.job_time_limit_s / 10)

    @property
    def artifacts_dir(self) -> Path:
        """Folder of the finished videos."""
        return self.data_dir / "artifacts"

    @property
    def files_dir(self) -> Path:
        """Folder of the uploaded files and of those made for batches."""
        return self.data_dir / "files"

    @property
    def datasets_dir(self) -> Path:
        """Folder of the files of clips of datasets."""
        return self.data_dir / "datasets"

    @property
    def sources_dir(self) -> Path:
        """Folder of the pictures and videos that clips are made from."""
        return self.data_dir / "sources"

    def broker_address(self) -> str:
        """URL of the broker.

        Raises:
            SettingsError: None is set.
        """
        if self.redis_url is None:
            raise SettingsError(f"{ENV_PREFIX}REDIS_URL is not set; set it, or run `medsora-server serve`")
        return _with_password(self.redis_url, self.redis_password)

    def environment(self) -> dict[str, str]:
        """The ``MEDSORA_*`` variables that give a child process these same settings."""
        variables: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, SecretStr):
                text = value.get_secret_value()
            elif isinstance(value, tuple):
                text = ",".join(one.get_secret_value() if isinstance(one, SecretStr) else str(one) for one in value)
            elif isinstance(value, (bool, int, float)):
                text = json.dumps(value)
            else:
                text = str(value)
            variables[ENV_PREFIX + name.upper()] = text
        return variables


def is_sealing_key(text: str) -> bool:
    """Whether it is 32 bytes in URL-safe base64."""
    try:
        return len(text) == 44 and len(base64.b64decode(text, altchars=b"-_", validate=True)) == 32
    except ValueError:
        return False


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse ``MEDSORA_*`` variables that no setting reads.

    Raises:
        SettingsError: Names every unknown variable, and the nearest known one where there is any.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | set(secret_files())
    problems = []
    for variable in sorted(environment):
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            problems.append(variable + (f" (did you mean {near[0]}?)" if near else ""))
    if problems:
        raise SettingsError(f"unknown environment variables: {', '.join(problems)}")


def load_settings(**overrides: Any) -> Settings:
    """Read the environment, and the files that it names; ``overrides`` (None is left out) win over it.

    Raises:
        SettingsError: An unknown variable, a bad value, or a file that cannot be read; the message names each.
    """
    check_environment(os.environ)
    given = {**_read_secret_files(os.environ), **overrides}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else ""
            lines.append(f"{ENV_PREFIX}{name.upper()}: {problem['msg']}" if name else problem["msg"])
        raise SettingsError("; ".join(lines)) from None


def secret_files() -> dict[str, str]:
    """Settings that may come from a file, by the variable that names it."""
    return {
        ENV_PREFIX + name.upper() + FILE_SUFFIX: name
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *get_args(field.annotation))
    }


def _read_secret_files(environment: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for variable, name in secret_files().items():
        path = environment.get(variable)
        if not path:
            continue
        if environment.get(ENV_PREFIX + name.upper()):
            raise SettingsError(f"{variable} and {ENV_PREFIX}{name.upper()} are both set; set one of them")
        try:
            values[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{variable}: cannot read {path}: {error}") from None
        if not values[name]:
            raise SettingsError(f"{variable}: {path} is empty")
    return values


def _url_password(url: str) -> str | None:
    return urlsplit(url).password or None


def _with_password(url: SecretStr, password: SecretStr | None) -> str:
    """The URL, with the password in its place."""
    text = url.get_secret_value()
    if password is None:
        return text
    scheme, _, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    user, _, address = authority.rpartition("@")
    return f"{scheme}://{user.removesuffix(':')}:{quote(password.get_secret_value(), safe='')}@{address}{slash}{path}"


def trace_service() -> str | None:
    """Name under which this server's traces are sent; None: the environment names no place to send them to.

    The variables are OpenTelemetry's, and its library reads the others (headers, sampling) itself.
    """
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not any(os.environ.get(name) for name in endpoints):
        return None
    return os.environ.get("OTEL_SERVICE_NAME") or "medsora-server"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Settings of this process, read from the environment once.

    Raises:
        SettingsError: See :func:`load_settings`.
    """
    return load_settings()
