"""The example client, which is also the demo, against a real embedded server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from medsora.video_io import probe_video

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate_over_http.py"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """URL and process id of an embedded server that is just starting."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
    environment |= {
        "MEDSORA_PORT": str(port),
        "MEDSORA_DATA_DIR": str(folder / "data"),
        "MEDSORA_CHECKPOINTS": str(tiny_checkpoint),
        "MEDSORA_DEVICE": "cpu",
    }
    with (folder / "log").open("wb") as log:
        command = [Path(sys.executable).with_name("medsora-server"), "serve"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def run_example(folder: Path, server: tuple[str, int], *options: str) -> subprocess.CompletedProcess[str]:
    url, pid = server
    command = [sys.executable, str(EXAMPLE), "--url", url, "--server-pid", str(pid), "--timeout", "120", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=180)


def test_it_waits_for_the_server_and_saves_video_and_sheet(tmp_path: Path, server: tuple[str, int]) -> None:
    options = ("--label", "Covid lung", "--seed", "7", "--output", "new/clip.mp4", "--contact-sheet", "sheet.png")
    result = run_example(tmp_path, server, *options)
    assert result.returncode == 0, result.stderr
    info = probe_video(tmp_path / "new" / "clip.mp4")
    assert (info.num_frames, info.width, info.height, info.codec) == (16, 32, 32, "h264")
    assert info.metadata["title"] == "Synthetic video: covid-convex"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 32 + 7 * 2, 16 + 32)
    assert "completed" in result.stdout


def test_the_same_seed_gives_the_same_file(tmp_path: Path, server: tuple[str, int]) -> None:
    for name in ("one", "two"):
        assert run_example(tmp_path, server, "--seed", "3", "--output", f"{name}.mp4").returncode == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_a_refusal_is_shown_in_the_servers_words(tmp_path: Path, server: tuple[str, int]) -> None:
    result = run_example(tmp_path, server, "--label", "brain")
    assert result.returncode == 1
    assert "regular-convex, covid-convex" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    result = run_example(tmp_path, (url, ended.pid))
    assert result.returncode == 1
    assert "ended while it was starting" in result.stderr
