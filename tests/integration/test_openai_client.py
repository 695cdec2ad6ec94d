"""The unmodified OpenAI client against real processes."""

import hashlib
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from PIL import Image

from medsora.video_io import probe_video

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

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


def test_iterating_while_deleting_reaches_every_video(server: "RunningServer") -> None:
    ids = [server.submit(seed=seed) for seed in range(5)]
    seen = []
    for video in server.client.videos.list(limit=2, order="asc", after=ids[0]):
        seen.append(video.id)
        server.client.videos.delete(video.id)
    assert seen == ids[1:]
    server.client.videos.delete(ids[0])


def test_thumbnail_and_spritesheet(server: "RunningServer") -> None:
    video = server.client.videos.create_and_poll(prompt="covid lung")
    for variant, kind, size in (("thumbnail", "WEBP", (32, 32)), ("spritesheet", "JPEG", (128, 128))):
        response = server.client.videos.download_content(video.id, variant=variant)  # type: ignore[arg-type]
        content = response.read()
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == (kind, size)
            assert "no patient" in image.getexif()[0x010E]
        assert response.response.headers["content-type"] == f"image/{kind.lower()}"
        url = f"/v1/videos/{video.id}/content?variant={variant}"
        part = server.http.get(url, headers={"range": "bytes=10-19", "if-range": response.response.headers["etag"]})
        assert (part.status_code, part.content) == (206, content[10:20])
    with pytest.raises(openai.BadRequestError, match="allowed: video, thumbnail, spritesheet"):
        server.client.videos.download_content(video.id, variant="gif")  # type: ignore[arg-type]
    server.client.videos.delete(video.id)
    assert [name for name in server.files() if video.id in name] == []


def test_remix(server: "RunningServer") -> None:
    extra = {"seed": 21, "num_inference_steps": 5}
    source: Any = server.client.videos.create_and_poll(prompt="covid lung", extra_body=extra)
    made: Any = server.client.videos.remix(source.id, prompt="regular convex")
    assert (made.remixed_from_video_id, made.label, made.seed, made.num_inference_steps) == (
        source.id, "regular-convex", 21, 5,
    )  # fmt: skip
    done: Any = server.client.videos.poll(made.id)
    assert (done.status, done.remixed_from_video_id) == ("completed", source.id)
    assert done.sha256 != source.sha256
    same: Any = server.client.videos.poll(server.client.videos.remix(made.id, prompt="covid lung").id)
    assert same.sha256 == source.sha256, "seed or settings were not kept"
    with pytest.raises(openai.BadRequestError, match="no label 'a cat'; allowed: regular-convex, covid-convex"):
        server.client.videos.remix(source.id, prompt="a cat")
    server.client.videos.delete(source.id)
    with pytest.raises(openai.NotFoundError, match="There is no video"):
        server.client.videos.remix(source.id, prompt="covid lung")
    slow = server.submit(steps=1000)
    with pytest.raises(openai.ConflictError, match="has no content: it is"):
        server.client.videos.remix(slow, prompt="covid lung")
    server.client.videos.delete(slow)


def test_what_needs_clean_prefixes_is_refused(server: "RunningServer") -> None:
    """By name, and with the field of the manifest that says so: the checkpoint of these tests has none."""
    reason = r"tiny was trained without clean prefixes \(limits.clean_prefixes"
    picture = ("a.png", b"x" * 300_000, "image/png")
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        server.client.videos.create(prompt="covid lung", input_reference=picture)
    assert (caught.value.param, caught.value.code) == ("input_reference", "input_reference_not_supported")
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        server.client.videos.extend(prompt="covid lung", seconds="2", video=picture)
    assert (caught.value.param, caught.value.code) == ("video", "video_not_supported")
    with pytest.raises(openai.BadRequestError, match="is no picture or video") as caught:
        server.client.videos.edit(prompt="covid lung", video=picture)
    assert (caught.value.param, caught.value.code) == ("video", "invalid_video")
    with pytest.raises(openai.BadRequestError, match="have no characters"):
        server.client.videos.create_character(name="a", video=picture)
    with pytest.raises(openai.NotFoundError, match="no characters"):
        server.client.videos.get_character("char_1")


def test_extra_body_as_the_client_flattens_it(server: "RunningServer") -> None:
    extra = {"seed": 3, "extra_params": {"num_inference_steps": 6}, "width": 32, "height": 32, "n": 1, "stream": False}
    neutral = {"negative_prompt": "", "lora": None, "metadata": {}, "return_stage_metrics": False}
    video: Any = server.client.videos.create(prompt="covid lung", extra_body={**extra, **neutral})
    assert (video.seed, video.num_inference_steps, video.size) == (3, 6, "32x32")
    server.client.videos.delete(video.id)
    for field, value in {
        "metadata": {"a": "b"},
        "lora": ["x"],
        "flow_shift": 3,
        "seed": [1, 2],
        "labels": ["a"],
    }.items():
        with pytest.raises(openai.BadRequestError, match=f"{field}: ") as caught:
            server.client.videos.create(prompt="covid lung", extra_body={field: value})
        assert caught.value.param == field


def test_poll_interval_and_request_id_reach_the_client(server: "RunningServer") -> None:
    server.wait_for(server.submit(), "succeeded")
    slow = server.submit(steps=1000)
    raw = server.client.videos.with_raw_response.retrieve(slow)
    assert 200 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    assert str(raw.request_id).startswith("req_")
    server.client.videos.delete(slow)


def test_full_queue_is_waited_out_by_the_client_and_costs_one_job(start_server: "StartServer") -> None:
    server = start_server(MEDSORA_MAX_QUEUED_JOBS="1")
    running = server.submit(steps=1000)
    server.wait_for(running, "running")
    waiting = server.submit()
    statuses = []

    def answered(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if len(statuses) == 1:
            server.repository.request_cancel(waiting)

    with (
        httpx.Client(event_hooks={"response": [answered]}) as http,
        openai.OpenAI(base_url=server.url, api_key="any", http_client=http) as client,
    ):
        began = time.monotonic()
        made = client.videos.create(prompt="covid lung")
    assert statuses == [429, 200]
    assert time.monotonic() - began > 1.5, "retry-after-ms was not heeded"
    jobs = server.repository.page(limit=10, after=None, newest_first=True)
    assert jobs is not None
    assert [job.id for job in jobs[0]] == [made.id, waiting, running]
    server.repository.request_cancel(running)


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
    job_id = server.submit(steps=200)
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
