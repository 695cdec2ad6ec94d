"""Settings: what is refused, and that children get the same."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from server.settings import Settings, SettingsError, load_settings


def test_every_setting_has_a_description() -> None:
    missing = [name for name, field in Settings.model_fields.items() if not field.description]
    assert missing == []


def test_defaults_serve_the_shipped_checkpoint_from_one_folder() -> None:
    settings = Settings()
    assert settings.checkpoints == ("lung-ultrasound-small",)
    assert settings.artifacts_dir.is_relative_to(settings.data_dir)
    assert settings.database_address == f"sqlite:///{settings.data_dir.resolve() / 'medsora.db'}"


def test_unknown_variable_is_refused_and_the_near_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_LEASES_S", "5")
    with pytest.raises(SettingsError, match=r"MEDSORA_LEASES_S \(did you mean MEDSORA_LEASE_S\?\)"):
        load_settings()


def test_bad_values_are_named_with_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_PORT", "99999")
    monkeypatch.setenv("MEDSORA_LEASE_S", "soon")
    with pytest.raises(SettingsError, match=r"MEDSORA_PORT: .*65535.*MEDSORA_LEASE_S|MEDSORA_LEASE_S.*MEDSORA_PORT"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MEDSORA_REDIS_URL", "amqp://host", "must start with redis://"),
        ("MEDSORA_DATABASE_URL", "mysql://host/db", "must start with sqlite:/// or postgresql"),
        ("MEDSORA_CHECKPOINTS", "a,a", "named twice"),
        ("MEDSORA_CHECKPOINTS", " , ", "at least 1"),
        ("MEDSORA_COMPILED", "yes", "MEDSORA_COMPILED: .*'auto', 'on' or 'off'"),
        ("MEDSORA_BATCH_SIZES", "1,4,2", "MEDSORA_BATCH_SIZES: .*must rise from each number to the next.*got 1,4,2"),
        ("MEDSORA_BATCH_SIZES", "2,2", "must rise"),
        ("MEDSORA_BATCH_SIZES", "0,1", "MEDSORA_BATCH_SIZES: .*greater than or equal to 1"),
        ("MEDSORA_BATCH_SIZES", "1,1025", "MEDSORA_BATCH_SIZES: .*less than or equal to 1024"),
        ("MEDSORA_BATCH_SIZES", "1,few", "MEDSORA_BATCH_SIZES: .*valid integer"),
        ("MEDSORA_BATCH_SIZES", ",".join(map(str, range(1, 18))), "MEDSORA_BATCH_SIZES: .*at most 16"),
        ("MEDSORA_WARM_UP_SHAPES", "16x128x128", "MEDSORA_WARM_UP_SHAPES: .*'default' or 'all'"),
        ("MEDSORA_HEARTBEAT_S", "50", "at most half of lease_s"),
        ("MEDSORA_JOB_TIME_LIMIT_S", "7200", "less than or equal to 6600"),
        ("MEDSORA_DEVICE", "tpu", "pattern"),
    ],
)
def test_values_that_would_do_harm(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_lists_are_read_from_text_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_BATCH_SIZES", "1, 2,16")
    monkeypatch.setenv("MEDSORA_CHECKPOINTS", " one,two ,")
    settings = load_settings()
    assert settings.batch_sizes == (1, 2, 16)
    assert settings.checkpoints == ("one", "two")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_secrets_are_not_shown() -> None:
    settings = Settings(redis_url="redis://:hunter2@host/0", database_url="postgresql://u:hunter2@host/db")
    assert "hunter2" not in repr(settings)
    assert settings.broker_address() == "redis://:hunter2@host/0"


def test_broker_is_asked_for_by_name() -> None:
    with pytest.raises(SettingsError, match="MEDSORA_REDIS_URL is not set"):
        Settings().broker_address()


def test_environment_gives_a_child_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, redis_url="redis://:p@host/0", checkpoints=("one", "two"), warm_up=False, lease_s=7.5,
        heartbeat_s=1.25, port=0, compiled="off", batch_sizes=(1, 8, 1024), warm_up_shapes="all",
    )  # fmt: skip
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_keywords_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_PORT", "1234")
    assert load_settings(port=4321, host=None).port == 4321


def test_secrets_come_from_files_and_go_into_their_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "redis").write_text("p/w:with@signs-1234\n")
    (tmp_path / "database").write_text("another-one-of-length\n")
    monkeypatch.setenv("MEDSORA_REDIS_URL", "redis://medsora@redis:6379/0")
    monkeypatch.setenv("MEDSORA_REDIS_PASSWORD_FILE", str(tmp_path / "redis"))
    monkeypatch.setenv("MEDSORA_DATABASE_URL", "postgresql+psycopg://medsora@postgres/medsora?connect_timeout=3")
    monkeypatch.setenv("MEDSORA_DATABASE_PASSWORD_FILE", str(tmp_path / "database"))
    settings = load_settings()
    assert settings.broker_address() == "redis://medsora:p%2Fw%3Awith%40signs-1234@redis:6379/0"
    assert settings.database_address == (
        "postgresql+psycopg://medsora:another-one-of-length@postgres/medsora?connect_timeout=3"
    )
    assert "signs" not in repr(settings)


def test_a_url_without_a_user_gets_its_password_too() -> None:
    settings = Settings(redis_url=SecretStr("redis://redis/0"), redis_password=SecretStr("sixteen-characters"))
    assert settings.broker_address() == "redis://:sixteen-characters@redis/0"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MEDSORA_REDIS_PASSWORD": "short"}, "MEDSORA_REDIS_PASSWORD: .*at least 16 characters, has 5"),
        ({"MEDSORA_DATABASE_PASSWORD": "my-changeme-password"}, "MEDSORA_DATABASE_PASSWORD: .*placeholder"),
        ({"MEDSORA_REDIS_PASSWORD": "sixteen-characters"}, "redis_password needs a redis_url"),
        (
            {"MEDSORA_REDIS_PASSWORD": "sixteen-characters", "MEDSORA_REDIS_URL": "redis://:other@host"},
            "redis_url names a password, too",
        ),
        ({"MEDSORA_REDIS_PASSWORD_FILE": "/nowhere/at/all"}, "MEDSORA_REDIS_PASSWORD_FILE: cannot read /nowhere"),
        ({"MEDSORA_REDIS_PASSWORD_FILE": "/dev/null"}, "MEDSORA_REDIS_PASSWORD_FILE: /dev/null is empty"),
        (
            {"MEDSORA_REDIS_PASSWORD_FILE": "/dev/null", "MEDSORA_REDIS_PASSWORD": "sixteen-characters"},
            "are both set",
        ),
        ({"MEDSORA_PORT_FILE": "/dev/null"}, "unknown environment variables: MEDSORA_PORT_FILE"),
    ],
)
def test_passwords_that_are_none_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings()
    assert "sixteen" not in str(caught.value)
