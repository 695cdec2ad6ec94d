"""Compile caches: in the data folder, for this user alone, set before torch is imported, unless set by others."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import SettingsError
from server.worker.compile_cache import keep_compiled_code

ROOT = Path(__file__).parents[3]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_caches_lie_in_the_data_folder_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment: dict[str, str] = {}
    keep_compiled_code(Path("data"), environment)
    caches = tmp_path / "data" / "compile-cache"
    assert environment == {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    assert {mode(path) for path in (caches, caches / "inductor", caches / "triton")} == {0o700}


def test_an_older_folder_is_closed_to_others_and_kept(tmp_path: Path) -> None:
    older = tmp_path / "compile-cache" / "triton"
    older.mkdir(parents=True)
    for folder in (older.parent, older):
        folder.chmod(0o777)
    (older / "kernel").write_bytes(b"compiled before")
    keep_compiled_code(tmp_path, {})
    assert (mode(older.parent), mode(older)) == (0o700, 0o700)
    assert (older / "kernel").read_bytes() == b"compiled before"


def test_the_operators_own_folders_win(tmp_path: Path) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}
    keep_compiled_code(tmp_path, environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "compile-cache" / "triton")
    assert not (tmp_path / "compile-cache" / "inductor").exists()
    environment["TRITON_CACHE_DIR"] = "/elsewhere/too"
    keep_compiled_code(tmp_path / "not made", environment)
    assert not (tmp_path / "not made").exists()


def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "compile-cache").write_text("a file")
    with pytest.raises(SettingsError, match=r"compile-cache/inductor .*set TORCHINDUCTOR_CACHE_DIR"):
        keep_compiled_code(tmp_path, {})


WORKER = """
import os, sys
import server.worker.celery_app as celery_app
from server.cli import app
class Celery:
    def worker_main(self, arguments):
        assert "torch" not in sys.modules
        print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
celery_app.make_celery = lambda settings: Celery()
app(["worker"])
"""


def test_the_worker_has_them_before_torch(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin", "MEDSORA_DATA_DIR": str(tmp_path), "TRITON_CACHE_DIR": "/elsewhere"}
    ran = subprocess.run(
        [sys.executable, "-c", WORKER], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "compile-cache" / "inductor"), "/elsewhere"]
