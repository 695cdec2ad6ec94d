"""What clips are made from: looked at before a job exists, kept as long as one refers to it, decoded with bounds."""

import base64
import io
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import update

from medsora.checkpoint import write_tiny_checkpoint
from medsora.video_io import write_ffv1, write_mp4
from server.app import create_app
from server.files.store import FileStore
from server.jobs.database import Database, database_now
from server.settings import Settings
from server.sources.media import MediaError, inspect, kind_of_media
from server.sources.model import Source
from server.sources.repository import SourceRepository
from server.worker.sources import read_frames

PIXELS = np.random.RandomState(0).randint(0, 256, (24, 32, 32, 3)).astype(np.uint8)


def picture(width: int = 32, height: int = 32, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def movie(folder: Path, frames: int = 8, *, fps: float = 8.0, size: int = 32, kind: str = "mp4") -> bytes:
    path = folder / f"movie.{kind}"
    write = write_mp4 if kind == "mp4" else write_ffv1
    write(path, np.ascontiguousarray(np.resize(PIXELS, (frames, size, size, 3))), fps=fps)
    return path.read_bytes()


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"0" * 10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def prefix_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "tiny", max_frames=64)


@pytest.fixture
def settings(tmp_path: Path, prefix_checkpoint: Path) -> Settings:
    (tmp_path / "data").mkdir()
    return Settings(
        data_dir=tmp_path / "data",
        redis_url="redis://127.0.0.1:1/0",
        checkpoints=(str(prefix_checkpoint),),
        min_free_bytes=0,
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as made:
        yield made


def kept(settings: Settings) -> list[Path]:
    return [path for path in settings.sources_dir.rglob("*") if path.is_file()]


def create(client: TestClient, content: bytes, **fields: str) -> Any:
    data = {"prompt": "covid lung", **fields}
    return client.post("/v1/videos", data=data, files={"input_reference": ("anything.txt", content)})


def completed(client: TestClient, folder: Path, frames: int = 16) -> str:
    """A job that a worker has finished."""
    services: Any = client.app.state.services  # type: ignore[attr-defined]
    seconds = str(frames // 8)
    job_id = client.post("/v1/videos", json={"prompt": "covid lung", "seconds": seconds}).json()["id"]
    claim = services.repository.claim(job_id, worker="w")
    content = movie(folder, frames)
    info = services.store.write(job_id, claim.token, lambda path: path.write_bytes(content) and None, Path.stat)
    from server.jobs.repository import FinishedWork

    times = {"sampling_s": 1.0, "encode_s": 0.0, "store_s": 0.0}
    work = FinishedWork(artifact=info.name, size_bytes=info.size_bytes, sha256=info.sha256, **times)
    assert services.repository.succeed(job_id, claim.token, work)
    return str(job_id)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (picture(), "png"),
        (picture(kind="JPEG"), "jpeg"),
        (picture(kind="WEBP", lossless=True), "webp"),
        (picture(kind="WEBP"), "webp"),
        (b"\x00\x00\x00\x20ftypisom0000", "mp4"),
        (b"GIF89a" + bytes(20), None),
        (b"#EXTM3U\nhttp://a/b", None),
        (b"<svg xmlns=", None),
        (b"", None),
    ],
)
def test_media_are_told_by_their_first_bytes(content: bytes, kind: str | None) -> None:
    assert kind_of_media(content[:16]) == kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_say_their_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    for options in ({}, {"lossless": True}) if kind == "WEBP" else ({},):
        path.write_bytes(picture(40, 24, kind, **options))
        media = inspect(path, max_frames=1)
        assert (media.width, media.height, media.num_frames, media.fps) == (40, 24, 1, None)
        assert read_frames(path, width=40, height=24, num_frames=1).shape == (1, 24, 40, 3)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_videos_say_size_length_and_rate(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(movie(tmp_path, 12, fps=12.5, kind=kind))
    media = inspect(tmp_path / "a", max_frames=12)
    assert (media.width, media.height, media.num_frames, media.fps) == (32, 32, 12, 12.5)
    frames = read_frames(tmp_path / "a", width=32, height=32, num_frames=12)
    assert frames.shape == (12, 32, 32, 3)
    if kind == "mkv":
        assert np.array_equal(frames, np.resize(PIXELS, (12, 32, 32, 3)))
    with pytest.raises(MediaError, match="more than the 11 frames"):
        inspect(tmp_path / "a", max_frames=11)
    with pytest.raises(MediaError, match="more than 11 frames"):
        read_frames(tmp_path / "a", width=32, height=32, num_frames=11)
    with pytest.raises(MediaError, match="not 64x32"):
        read_frames(tmp_path / "a", width=64, height=32, num_frames=12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (huge_png(100_000, 100_000), "has 100000x100000 pixels"),
        (picture(16000, 2, "WEBP", lossless=True)[:21] + b"\xff\xff\xff\x0f" + bytes(40), "has 16384x16384 pixels"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a damaged picture"),
        (b"\xff\xd8\xff" + bytes(100), "is a damaged picture"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(100), "is a damaged video"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "is a damaged video"),
        (b"hello", "is no picture or video"),
    ],
)
def test_what_is_damaged_or_too_large_is_told_without_decoding(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    began = time.monotonic()
    with pytest.raises(MediaError, match=message):
        inspect(tmp_path / "a", max_frames=64)
    assert time.monotonic() - began < 5


def test_animations_and_turned_pictures_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 99)]
    for kind in ("PNG", "WEBP"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        with pytest.raises(MediaError, match="is an animation"):
            inspect(tmp_path / "a", max_frames=64)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "a", "JPEG", exif=exif)
    with pytest.raises(MediaError, match="turned"):
        inspect(tmp_path / "a", max_frames=64)


def test_transparent_pixels_are_refused_by_the_decoder(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (1, 2, 3, 99)).save(tmp_path / "a", "PNG")
    with pytest.raises(MediaError, match="transparent"):
        read_frames(tmp_path / "a", width=32, height=32, num_frames=1)
    Image.new("RGBA", (32, 32), (1, 2, 3, 255)).save(tmp_path / "a", "PNG")
    assert read_frames(tmp_path / "a", width=32, height=32, num_frames=1)[0, 0, 0].tolist() == [1, 2, 3]


def test_a_playlist_in_the_disguise_of_a_video_opens_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(movie(tmp_path))
    playlist = f"ftyp\nffconcat version 1.0\nfile {secret}\n".encode()
    (tmp_path / "a").write_bytes(b"\x00\x00\x00\x10" + playlist)
    with pytest.raises(MediaError):
        inspect(tmp_path / "a", max_frames=64)


def test_a_picture_becomes_the_beginning_of_a_video(client: TestClient, settings: Settings) -> None:
    video = create(client, picture()).json()
    assert (video["status"], video["seconds"], video["source"]) == ("queued", "2", "reference")
    job = client.app.state.services.repository.get(video["id"])  # type: ignore[attr-defined]
    assert (job.source_kind, job.prefix_frames, job.strength, job.source_video) == ("reference", 1, 1.0, None)
    (path,) = kept(settings)
    assert path.read_bytes() == picture()
    source = client.app.state.services.sources._repository.get(job.source_id)  # type: ignore[attr-defined]
    assert (source.tenant, source.media, source.num_frames) == ("default", "png", 1)


def test_a_picture_may_come_as_a_data_url(client: TestClient) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    for body in (
        {"input_reference": {"image_url": url}},
        {"input_reference_url": url},
        {"reference_url": url},
        {"image_url": url},
        {"extra_body": {"input_reference": {"image_url": url}}},
    ):
        response = client.post("/v1/videos", json={"prompt": "covid lung", **body})
        assert (response.status_code, response.json()["source"]) == (200, "reference"), response.text
    form = {"prompt": "covid lung", "input_reference[image_url]": url}
    assert client.post("/v1/videos", data=form).json()["source"] == "reference"
    form = {"prompt": "covid lung", "input_reference": f'{{"image_url": "{url}"}}'}
    assert client.post("/v1/videos", data=form).json()["source"] == "reference"


def test_a_picture_may_be_a_file_and_outlives_it(client: TestClient, settings: Settings) -> None:
    upload = {"file": ("a.png", picture())}
    file_id = client.post("/v1/files", data={"purpose": "vision"}, files=upload).json()["id"]
    body = {"prompt": "covid lung", "input_reference": {"file_id": file_id}}
    assert client.post("/v1/videos", json=body).json()["source"] == "reference"
    client.delete(f"/v1/files/{file_id}")
    assert [path.read_bytes() for path in kept(settings)] == [picture()]
    assert client.post("/v1/videos", json=body).status_code == 404


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"image_url": "https://example.org/a.png"}, "other addresses are not fetched"),
        ({"image_url": "file:///etc/passwd"}, "other addresses are not fetched"),
        ({"image_url": "data:image/png,abc"}, "in base64"),
        ({"image_url": "data:image/png;base64,%%%"}, "no valid base64"),
        ({"image_url": "data:image/png;base64,"}, "is empty"),
        ({"image_url": "data:image/png;base64,aGVsbG8="}, "is no picture or video that is read here"),
        ({"image_url": "a", "file_id": "b"}, "not both"),
        ({"image_url": 3}, "as text"),
        ({"url": "a"}, "got 'url'"),
        ([1], "must be a file, or an object"),
        (5, "must be a file, or an object"),
    ],
)
def test_references_that_cannot_be_had_are_refused(client: TestClient, reference: Any, message: str) -> None:
    response = client.post("/v1/videos", json={"prompt": "covid lung", "input_reference": reference})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "input_reference", "invalid_input_reference")
    assert message in error["message"]


def test_references_that_do_not_fit_are_refused_and_not_kept(
    client: TestClient, settings: Settings, tmp_path: Path
) -> None:
    cases = (
        (picture(64, 32), "is 64x32; allowed: the size of the video, 32x32"),
        (huge_png(100_000, 100_000), "has 100000x100000 pixels"),
        (movie(tmp_path, 8, size=64), "is 64x64"),
        (movie(tmp_path, 8, fps=25), "has 25 frames a second; allowed: 8"),
        (movie(tmp_path, 16), "has more than the 15 frames"),
        (movie(tmp_path, 8)[:500], "damaged"),
        (b"", "is empty"),
    )
    for content, message in cases:
        error = create(client, content).json()["error"]
        assert error["param"] == "input_reference"
        assert message in error["message"]
    assert client.get("/v1/videos").json()["data"] == []
    assert kept(settings) == []


def test_an_upload_that_is_too_large_is_refused(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"max_body_bytes": 2048}))) as client:
        response = create(client, picture() + bytes(4096))
    assert response.status_code == 413


def test_a_video_as_reference_is_its_first_frames(client: TestClient, tmp_path: Path) -> None:
    video = create(client, movie(tmp_path, 12)).json()
    assert client.app.state.services.repository.get(video["id"]).prefix_frames == 12  # type: ignore[attr-defined]
    video = create(client, movie(tmp_path, 20), seconds="4").json()
    assert (video["seconds"], video["num_frames"]) == ("4", 32)


def test_an_edit_has_the_length_and_settings_of_its_video(
    client: TestClient, tmp_path: Path, settings: Settings
) -> None:
    source = completed(client, tmp_path, 24)
    for fields in ({"video_id": source}, {"video": {"id": source}}):
        response = client.post("/v1/videos/edits", json={"prompt": "regular lung", **fields, "strength": 0.3})
        video = response.json()
        assert (video["num_frames"], video["source"], video["source_video_id"]) == (24, "edit", source), response.text
        job = client.app.state.services.repository.get(video["id"])  # type: ignore[attr-defined]
        assert (job.strength, job.prefix_frames, job.label) == (0.3, 0, "regular-convex")
    upload = {"video": ("a.mp4", movie(tmp_path, 16))}
    video = client.post("/v1/videos/edits", data={"prompt": "regular lung"}, files=upload).json()
    assert (video["num_frames"], video["source_video_id"]) == (16, None)
    # as OpenAI's client can send an id: beside an empty file
    form = {"prompt": "regular lung", "video_id": source}
    video = client.post("/v1/videos/edits", data=form, files={"video": ("upload", b"")}).json()
    assert video["source_video_id"] == source
    client.delete(f"/v1/videos/{source}")
    assert len(kept(settings)) == 4


def test_an_extension_is_as_long_as_both(client: TestClient, tmp_path: Path) -> None:
    source = completed(client, tmp_path, 24)
    body = {"prompt": "regular lung", "video": {"id": source}, "seconds": "2"}
    video = client.post("/v1/videos/extensions", json=body).json()
    assert (video["seconds"], video["source"], video["source_video_id"]) == ("5", "extension", source)
    job = client.app.state.services.repository.get(video["id"])  # type: ignore[attr-defined]
    assert (job.num_frames, job.prefix_frames) == (40, 8)
    upload = {"video": ("a.mp4", movie(tmp_path, 8))}
    video = client.post("/v1/videos/extensions", data={"prompt": "regular lung", "seconds": "1"}, files=upload).json()
    assert video["seconds"] == "2"


@pytest.mark.parametrize(
    ("where", "fields", "param", "message"),
    [
        ("edits", {"strength": 0}, "strength", "above 0"),
        ("edits", {"strength": 1}, "strength", "below 1"),
        ("edits", {"seconds": "2"}, "seconds", "is taken from the video"),
        ("edits", {"size": "32x32"}, "size", "is taken from the video"),
        ("extensions", {"seconds": "1.5"}, "seconds", "multiples of 1"),
        ("extensions", {"seconds": "x"}, "seconds", "multiples of 1"),
        ("extensions", {"seconds": "-1"}, "seconds", "multiples of 1"),
        ("extensions", {"seconds": "7"}, "video", "has 16 frames; allowed: up to 8"),
        ("extensions", {"num_frames": 12}, "num_frames", "multiples of 8"),
        ("extensions", {"num_frames": 8, "seconds": "1"}, "num_frames", "one of them"),
        ("extensions", {"strength": 0.5}, "strength", "not a known field"),
        ("extensions", {"video": {"id": "video_1"}}, "video_id", "one of them"),
        ("edits", {"prompt": "a cat"}, "prompt", "no label"),
    ],
)
def test_what_cannot_be_made_of_a_video_is_refused(
    client: TestClient, tmp_path: Path, where: str, fields: dict[str, Any], param: str, message: str
) -> None:
    source = completed(client, tmp_path)
    response = client.post(f"/v1/videos/{where}", json={"prompt": "regular lung", "video_id": source, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_videos_that_are_not_there_or_not_done_are_refused(client: TestClient) -> None:
    waiting = client.post("/v1/videos", json={"prompt": "covid lung"}).json()["id"]
    for where in ("edits", "extensions"):
        for video_id, status in ((waiting, 409), ("video_" + "0" * 32, 404), ("x", 404)):
            response = client.post(f"/v1/videos/{where}", json={"prompt": "covid lung", "video": {"id": video_id}})
            assert response.status_code == status
        response = client.post(f"/v1/videos/{where}", json={"prompt": "covid lung"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "video")


def test_a_remix_is_made_from_the_same(client: TestClient, settings: Settings) -> None:
    services: Any = client.app.state.services  # type: ignore[attr-defined]
    from server.jobs.repository import FinishedWork

    made = create(client, picture()).json()["id"]
    claim = services.repository.claim(made, worker="w")
    info = services.store.write(made, claim.token, lambda path: path.write_bytes(b"x") and None, Path.stat)
    times = {"sampling_s": 1.0, "encode_s": 0.0, "store_s": 0.0}
    services.repository.succeed(
        made, claim.token, FinishedWork(artifact=info.name, size_bytes=1, sha256=info.sha256, **times)
    )
    remix = client.post(f"/v1/videos/{made}/remix", json={"prompt": "regular lung"}).json()
    one, other = services.repository.get(made), services.repository.get(remix["id"])
    assert (other.source_kind, other.source_id, other.prefix_frames) == ("reference", one.source_id, 1)
    assert len(kept(settings)) == 1


def test_sources_go_when_no_job_refers_to_them(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.reaper import Reaper

    database = Database(settings.database_address)
    sources, store = SourceRepository(database), FileStore(settings.sources_dir)
    reaper: Any = Reaper.__new__(Reaper)
    reaper._sources, reaper._source_store, reaper._stop = sources, store, threading.Event()
    first, second = (create(client, picture()).json()["id"] for _ in range(2))
    orphan = store.path("file-" + "a" * 32)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"of a process that died")
    client.delete(f"/v1/videos/{first}")
    assert reaper._remove_sources() == 0  # all of it is young
    with database.write() as connection:
        connection.execute(update(Source).values(created_at=database_now() - 4000.0))
    for path in kept(settings):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    assert reaper._remove_sources() == 2
    (left,) = kept(settings)
    assert client.app.state.services.repository.get(second).source_id == left.name  # type: ignore[attr-defined]
    database.close()
