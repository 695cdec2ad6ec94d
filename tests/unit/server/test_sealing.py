"""What is sealed tells nothing, and is opened by those who have a key of it alone."""

import threading
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import select

from server.idempotency import (
    Answer,
    Begun,
    IdempotentRequest,
    IdempotentRequests,
    Made,
    OtherRequest,
    note_made,
    working_on,
)
from server.jobs.database import Database
from server.sealing import FILE_NAME, Sealer, SealError, new_key
from server.settings import Settings, SettingsError
from server.webhooks.signature import PREFIX, new_secret, open_secret, seal_secret


def with_keys(folder: Path, *keys: str) -> Sealer:
    return Sealer(Settings(data_dir=folder, secrets_keys=tuple(map(SecretStr, keys))))


def test_what_is_sealed_is_opened_with_the_same_file(tmp_path: Path) -> None:
    sealed = Sealer(Settings(data_dir=tmp_path)).seal(b"secret")
    assert b"secret" not in sealed
    assert Sealer(Settings(data_dir=tmp_path)).seal(b"secret") != sealed
    assert Sealer(Settings(data_dir=tmp_path)).open(sealed) == b"secret"
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_keys_of_the_settings_come_first_and_no_file_is_made(tmp_path: Path) -> None:
    key = new_key()
    assert with_keys(tmp_path, key).open(with_keys(tmp_path, key).seal(b"secret")) == b"secret"
    assert list(tmp_path.iterdir()) == []


def test_a_new_key_seals_and_the_old_one_still_opens(tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    sealed = with_keys(tmp_path, old).seal(b"secret")
    both = with_keys(tmp_path, new, old)
    assert both.open(sealed) == b"secret"
    assert with_keys(tmp_path, new).open(both.seal(b"secret")) == b"secret"
    with pytest.raises(SealError):
        with_keys(tmp_path, new).open(sealed)


def test_what_was_altered_is_not_opened(tmp_path: Path) -> None:
    sealer = with_keys(tmp_path, new_key())
    sealed = sealer.seal(b"secret")
    with pytest.raises(SealError):
        sealer.open(sealed[:-8] + (b"AAAAAAA=" if not sealed.endswith(b"AAAAAAA=") else b"BBBBBBA="))
    with pytest.raises(SealError):
        sealer.open(sealed[:20])


def test_processes_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    sealers = [Sealer(Settings(data_dir=tmp_path)) for _ in range(8)]
    threads = [threading.Thread(target=sealer.load) for sealer in sealers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {sealer.open(sealers[0].seal(b"x")) for sealer in sealers} == {b"x"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", ["", "short", "A" * 44, "A" * 43 + "=\nno key"])
def test_a_damaged_file_is_told_at_the_start_without_what_is_in_it(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(SettingsError, match=r"^secrets.key: must hold keys of 32 random bytes") as caught:
        Sealer(Settings(data_dir=tmp_path)).load()
    assert "no key" not in str(caught.value)


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_text(new_key())
    (tmp_path / FILE_NAME).chmod(0o644)
    Sealer(Settings(data_dir=tmp_path)).load()
    assert "can be read by others" in caplog.text


def test_settings_refuse_what_is_no_key_and_hand_keys_on(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="32 random bytes"):
        Settings(data_dir=tmp_path, secrets_keys=(SecretStr("hunter2"),))
    keys = f"{new_key()},{new_key()}"
    settings = Settings(data_dir=tmp_path, secrets_keys=keys)  # type: ignore[arg-type]  # as the environment has it
    assert settings.environment()["MEDSORA_SECRETS_KEYS"] == keys
    assert keys[:20] not in repr(settings)


def test_secrets_of_webhooks_fit_their_column(tmp_path: Path) -> None:
    sealer = with_keys(tmp_path, new_key())
    secret = new_secret()
    assert open_secret(sealer, seal_secret(sealer, secret)) == secret
    assert open_secret(sealer, secret) == secret, "of a database from before anything was sealed"
    longest = PREFIX + "A" * 84 + "AA=="
    assert len(seal_secret(sealer, longest)) <= 200


def test_answers_that_are_kept_are_sealed(database: Database, tmp_path: Path) -> None:
    """That to the request which made a webhook tells its secret."""
    answer = Answer(200, "application/json", b'{"secret": "whsec_canary"}')
    requests = IdempotentRequests(database, with_keys(tmp_path, new_key()))
    for key, object_id in (("a", "wh_1"), ("b", None)):
        begun = requests.begin("t", key, "f")
        assert isinstance(begun, Begun)
        if object_id is not None:
            with database.write() as connection, working_on(begun):
                note_made(connection, object_id)
        requests.finish(begun, answer)
    with database.read() as connection:
        assert all(b"canary" not in body for body in connection.scalars(select(IdempotentRequest.body)))
    assert requests.begin("t", "a", "f") == answer
    others = IdempotentRequests(database, with_keys(tmp_path, new_key()))
    assert others.begin("t", "a", "f") == Made("wh_1")
    assert others.begin("t", "b", "f") == OtherRequest()
