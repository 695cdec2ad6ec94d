"""Videos from pictures and videos, long ones, and their streams: real processes, OpenAI's client."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from medsora.checkpoint import write_tiny_checkpoint
from medsora.video_io import probe_video, read_video

if TYPE_CHECKING:
    from tests.integration.conftest import RunningServer

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

STEPS = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def prefix_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "tiny", max_frames=256)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefix_checkpoint: Path) -> Iterator["RunningServer"]:
    from tests.integration.conftest import RunningServer

    running = RunningServer(tmp_path_factory.mktemp("served") / "data", prefix_checkpoint)
    yield running
    assert running.stop() == 0, "\n".join(running.lines[-40:])


def finished(server: "RunningServer", video: Any) -> Any:
    done = server.client.videos.poll(video.id, poll_interval_ms=50)
    assert done.status == "completed", done
    return done


def frames_of(server: "RunningServer", video: Any, folder: Path) -> Any:
    path = folder / f"{video.id}.mp4"
    path.write_bytes(server.client.videos.download_content(video.id).content)
    assert "synthetic" in probe_video(path).metadata["comment"]
    return read_video(path)[0].astype(int)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_edits_and_extensions(server: "RunningServer", tmp_path: Path) -> None:
    videos = server.client.videos
    reference = ("a.png", picture(), "image/png")
    seed: dict[str, object] = {"seed": 3, **STEPS}
    begun = finished(server, videos.create(prompt="covid lung", input_reference=reference, extra_body=seed))
    again = finished(server, videos.create(prompt="covid lung", input_reference=reference, extra_body=seed))
    other = finished(server, videos.create(prompt="covid lung", extra_body=seed))
    assert begun.sha256 == again.sha256 != other.sha256
    assert len(frames_of(server, begun, tmp_path)) == 16
    for variant in ("thumbnail", "spritesheet"):
        content = videos.download_content(begun.id, variant=variant).content
        with Image.open(io.BytesIO(content)) as still:
            still.load()

    by_id: Any = {"video_id": begun.id, "seed": 5}
    extended = finished(server, videos.extend(prompt="regular lung", seconds="2", video=b"", extra_body=by_id))
    assert (extended.seconds, extended.source, extended.source_video_id) == ("4", "extension", begun.id)
    whole, start = frames_of(server, extended, tmp_path), frames_of(server, begun, tmp_path)
    assert len(whole) == 32
    # encoded a second time, and else the same
    assert np.abs(whole[:16] - start).mean() < 4

    near: Any = {"video_id": begun.id, "seed": 5, "strength": 0.05}
    edited = finished(server, videos.edit(prompt="regular lung", video=b"", extra_body=near))
    far = finished(server, videos.edit(prompt="regular lung", video=b"", extra_body={**near, "strength": 0.95}))
    apart = [np.abs(frames_of(server, video, tmp_path) - start).mean() for video in (edited, far)]
    assert apart[0] < apart[1]

    videos.delete(begun.id)
    remixed = finished(server, videos.remix(extended.id, prompt="covid lung"))
    assert remixed.source == "extension"
    assert len(frames_of(server, remixed, tmp_path)) == 32


def test_a_damaged_video_is_a_failed_job_that_says_so(server: "RunningServer") -> None:
    video = server.client.videos.create(prompt="covid lung", input_reference=("a.png", picture()[:300]))
    done: Any = server.client.videos.poll(video.id, poll_interval_ms=50)
    assert (done.status, done.error.code) == ("failed", "source_invalid")
    assert "input_reference: is a damaged picture" in done.error.message


class Watcher(threading.Thread):
    """Reads a stream, and notes when each piece came."""

    def __init__(self, server: "RunningServer", video_id: str, *, url: str | None = None) -> None:
        super().__init__(daemon=True)
        self._url = f"{url or server.url}/videos/{video_id}/stream"
        self.content = b""
        self.began_at = 0.0
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("GET", self._url, timeout=60) as answer:
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "video/mp4"
                for piece in answer.iter_raw():
                    self.began_at = self.began_at or time.monotonic()
                    self.content += piece
        except (httpx.HTTPError, AssertionError) as error:
            self.error = error

    def result(self) -> bytes:
        self.join(90)
        assert not self.is_alive()
        assert self.error is None, self.error
        return self.content


def num_frames(content: bytes, folder: Path) -> int:
    path = folder / "stream.mp4"
    path.write_bytes(content)
    return len(read_video(path)[0])


def long_video(server: "RunningServer", *, steps: int, frames: int = 256) -> str:
    extra: Any = {"num_frames": frames, "num_inference_steps": steps, "seed": 7}
    return server.client.videos.create(prompt="covid lung", extra_body=extra).id


def test_a_long_video_plays_while_it_is_made(server: "RunningServer", tmp_path: Path) -> None:
    video_id = long_video(server, steps=40)
    early = Watcher(server, video_id)
    server.wait_until(lambda: early.began_at, timeout_s=60, what="the first bytes")
    assert server.job(video_id).status.value == "running"
    assert early.content[4:8] == b"ftyp"
    late = Watcher(server, video_id)
    assert num_frames(early.result(), tmp_path) == 256
    assert late.result() == early.content
    job = server.wait_for(video_id, "succeeded")
    assert job.completed_at is not None
    # finished: the file itself
    with httpx.stream("GET", f"{server.url}/videos/{video_id}/stream") as answer:
        assert answer.read() == server.client.videos.download_content(video_id).content
    shown = frames_of(server, server.client.videos.retrieve(video_id), tmp_path)
    streamed = read_video(tmp_path / "stream.mp4")[0].astype(int)
    assert np.abs(shown - streamed).mean() < 8  # the same pictures, which are noise, encoded in two ways


@contextmanager
def second_api(server: "RunningServer", folder: Path) -> Iterator[str]:
    """Another API process on the same data; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        **server.variables,
        "MEDSORA_KEYS": "off",
        "MEDSORA_DATA_DIR": str(server.data_dir),
        "MEDSORA_REDIS_URL": f"redis+socket://{server.data_dir / 'run' / 'redis.sock'}",
    }
    command = [sys.executable, "-m", "server.cli", "api", "--port", str(port)]
    with (folder / "second.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with suppress(httpx.HTTPError):
                return httpx.get(f"{url}/v1/models").status_code == 200
            return False

        server.wait_until(answers, timeout_s=60, what="the second API process")
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_stream_outlives_the_worker_in_every_api_process(server: "RunningServer", tmp_path: Path) -> None:
    with second_api(server, tmp_path) as url:
        video_id = long_video(server, steps=40)
        watcher, other = Watcher(server, video_id), Watcher(server, video_id, url=url)
        for one in (watcher, other):
            server.wait_until(lambda one=one: len(one.content) > 10_000, timeout_s=60, what="some of the stream")
        (pid,) = server.sampling_pids()
        os.kill(pid, signal.SIGKILL)
        content = watcher.result()
        assert other.result() == content
    job = server.wait_for(video_id, "succeeded")
    assert job.attempt == 2
    assert num_frames(content, tmp_path) == 256


def test_a_stream_of_a_video_that_is_deleted_is_cut_off(server: "RunningServer") -> None:
    video_id = long_video(server, steps=200)
    watcher = Watcher(server, video_id)
    server.wait_until(lambda: watcher.began_at, timeout_s=60, what="the first bytes")
    server.client.videos.delete(video_id)
    watcher.join(30)
    assert isinstance(watcher.error, httpx.RemoteProtocolError)
    assert server.http.get(f"/v1/videos/{video_id}/stream").status_code == 404


def test_a_short_video_is_streamed_when_it_is_finished(server: "RunningServer") -> None:
    video_id = server.submit(steps=100)
    content = Watcher(server, video_id).result()
    assert content == server.client.videos.download_content(video_id).content
    server.wait_for(video_id, "succeeded")
    failed = server.submit(steps=1000)
    server.http.delete(f"/v1/videos/{failed}")
    with pytest.raises(openai.NotFoundError):
        server.client.get(f"/videos/{failed}/stream", cast_to=httpx.Response)
