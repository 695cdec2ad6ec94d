"""The unmodified OpenAI client against real processes."""

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from medsora.video_io import probe_video

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


def test_create_and_poll_then_download(server: "RunningServer", tmp_path: Path) -> None:
    extra = {"seed": 11, "num_inference_steps": 6, "guidance_scale": 1.5}
    video: Any = server.client.videos.create_and_poll(prompt="Covid lung", seconds="2", size="32x32", extra_body=extra)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.label, video.seed, video.num_inference_steps, video.guidance_scale) == ("covid-convex", 11, 6, 1.5)
    assert video.inference_time_s > 0
    content = server.client.videos.download_content(video.id).read()
    assert hashlib.sha256(content).hexdigest() == video.sha256
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height, info.fps, info.codec) == (16, 32, 32, 8.0, "h264")
    origin = json.loads(info.metadata["comment"])
    model: Any = server.client.models.retrieve("tiny")
    assert origin["synthetic"] is True
    assert (origin["label"], origin["seed"], origin["model"]) == ("covid-convex", 11, "tiny")
    assert origin["model_sha256"] == model.sha256
    assert "not for diagnosis" in info.metadata["description"]


def test_same_request_gives_the_same_file(server: "RunningServer") -> None:
    jobs = [server.wait_for(server.submit(seed=5), "succeeded") for _ in range(2)]
    other = server.wait_for(server.submit(seed=6), "succeeded")
    assert jobs[0].sha256 == jobs[1].sha256 != other.sha256


def test_list_pages_by_itself_and_deleted_videos_are_gone(server: "RunningServer") -> None:
    ids = [server.submit(seed=seed) for seed in range(5)]
    for job_id in ids:
        server.wait_for(job_id, "succeeded")
    listed = [video.id for video in server.client.videos.list(limit=2)]
    assert listed[:5] == ids[::-1]
    assert len(listed) == len(set(listed))
    for job_id in ids:
        assert server.client.videos.delete(job_id).deleted
        with pytest.raises(openai.NotFoundError, match="There is no video"):
            server.client.videos.retrieve(job_id)
    assert [name for name in server.files() if any(job_id in name for job_id in ids)] == []


def test_download_of_a_part(server: "RunningServer") -> None:
    job = server.wait_for(server.submit(), "succeeded")
    assert job.size_bytes is not None
    url = f"/v1/videos/{job.id}/content"
    whole = server.http.get(url).content
    part = server.http.get(url, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{job.size_bytes}"
    beyond = server.http.get(url, headers={"range": f"bytes={job.size_bytes}-"})
    assert beyond.status_code == 416


def test_errors_are_readable(server: "RunningServer") -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"no label 'a cat'; allowed: regular-convex, covid-convex"
    ) as caught:
        server.client.videos.create(prompt="a cat")
    assert (caught.value.param, caught.value.code) == ("prompt", "invalid_prompt")
    assert caught.value.request_id
    slow = server.submit(steps=1000)
    began = time.monotonic()
    with pytest.raises(openai.ConflictError, match="has no content: it is"):
        server.client.videos.download_content(slow)
    assert time.monotonic() - began < 1.0, "the client tried again"
    server.http.delete(f"/v1/videos/{slow}")


def test_progress_moves_with_the_steps(server: "RunningServer") -> None:
    job_id = server.submit(steps=60)
    seen = set()
    while server.job(job_id).completed_at is None:
        video = server.http.get(f"/v1/videos/{job_id}").json()
        if video["status"] == "in_progress":
            seen.add(video["progress"])
    assert len(seen) > 10, seen
    assert max(seen) <= 99


def test_deleted_running_job_stops_within_a_step_and_frees_the_worker(server: "RunningServer") -> None:
    job_id = server.submit(steps=1000)
    job = server.wait_for_steps(job_id, 5)
    assert job.started_at is not None
    assert server.client.videos.delete(job_id).deleted
    deleted_at = time.monotonic()
    assert server.http.get(f"/v1/videos/{job_id}").status_code == 404
    following = server.wait_for(server.submit(), "succeeded")
    # 1000 steps take many seconds; the next job is done long before.
    assert time.monotonic() - deleted_at < 5.0
    assert following.attempt == 1
    assert [name for name in server.files() if job_id in name] == []


def test_wrong_bodies_reach_real_sockets(server: "RunningServer") -> None:
    response = server.http.post("/v1/videos", content=b"{", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    try:
        response = server.http.post(
            "/v1/videos", content=b"x" * (26 * 2**20), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the server hung up before we had sent it all, which is its right
    assert server.http.get("/health/live").status_code == 200


def test_api_process_is_free_of_torch(server: "RunningServer") -> None:
    maps = Path(f"/proc/{server.child('api').pid}/maps").read_text()
    assert "libtorch" not in maps
    assert any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in server.sampling_pids())


def test_metrics_and_readiness(server: "RunningServer") -> None:
    server.wait_for(server.submit(), "succeeded")
    assert server.http.get("/health/ready").json()["status"] == "ready"
    text = server.http.get("/metrics").text
    assert 'medsora_requests_total{model="tiny",status="succeeded"}' in text
    assert "medsora_worker_up{" in text


def test_second_server_on_the_same_data_is_refused(server: "RunningServer", tiny_checkpoint: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--data-dir", str(server.data_dir)]
    command += ["--checkpoint", str(tiny_checkpoint)]
    second = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
    assert second.returncode == 2
    assert f"another server (process {server.process.pid}) uses the data folder" in second.stderr
    assert server.http.get("/health/ready").status_code == 200
