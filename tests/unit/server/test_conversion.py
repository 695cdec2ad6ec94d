"""DICOM and animated WebP of a stored video, made by a real child process when they are asked for."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from medsora.provenance import SYNTHETIC_NOTE, clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import write_ffv1, write_mp4
from server.api.dependencies import Services
from server.conversion import ConversionError, Form, convert
from server.jobs.repository import FinishedWork
from server.settings import Settings
from server.storage import Variant

FRAMES = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
REQUEST = GenerationRequest(
    label="covid-convex", seed=1, num_frames=16, height=32, width=32, num_inference_steps=4, guidance_scale=1.0,
    sampler="euler",
)  # fmt: skip
METADATA = clip_metadata(REQUEST, model="tiny", model_sha256="0" * 64)


@pytest.fixture
def video(client: TestClient) -> str:
    """A finished video with real files; returns its id."""
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    video_id = str(client.post("/v1/videos", json={"prompt": "covid-convex"}).json()["id"])
    claim = services.repository.claim(video_id, worker="w")
    assert claim is not None
    stored = services.store.write_all(
        video_id,
        claim.token,
        {
            Variant.VIDEO: (lambda path: write_mp4(path, FRAMES, fps=8.0, metadata=METADATA), lambda _: None),
            Variant.LOSSLESS: (lambda path: write_ffv1(path, FRAMES, fps=8.0, metadata=METADATA), lambda _: None),
        },
    )
    info = stored[Variant.VIDEO]
    work = FinishedWork(
        artifact=info.name, size_bytes=info.size_bytes, sha256=info.sha256, sampling_s=1.0, encode_s=1.0, store_s=1.0
    )
    assert services.repository.succeed(video_id, claim.token, work)
    return video_id


def test_dicom_has_every_bit_and_says_that_it_is_synthetic(client: TestClient, video: str) -> None:
    url = f"/v1/videos/{video}/content?variant=dicom"
    response = client.get(url)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/dicom")
    assert f'filename="{video}.dcm"' in response.headers["content-disposition"]
    assert response.headers["content-length"] == str(len(response.content))
    read = pydicom.dcmread(io.BytesIO(response.content))
    np.testing.assert_array_equal(read.pixel_array, FRAMES)
    assert (read.SyntheticData, read.Modality, read.NumberOfFrames, float(read.FrameTime)) == ("YES", "US", 16, 125)
    assert client.get(url, headers={"if-none-match": response.headers["etag"]}).status_code == 304


def test_preview_is_an_animation_that_says_that_it_is_synthetic(client: TestClient, video: str) -> None:
    response = client.get(f"/v1/videos/{video}/content?variant=preview")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/webp")
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.n_frames, image.size) == (16, (32, 32))
        assert image.getexif()[0x010E] == SYNTHETIC_NOTE


def test_the_exact_copy_is_a_file_like_the_others(client: TestClient, video: str) -> None:
    url = f"/v1/videos/{video}/content?variant=lossless"
    whole = client.get(url)
    assert whole.headers["content-type"] == "video/x-matroska"
    part = client.get(url, headers={"range": "bytes=4-9"})
    assert (part.status_code, part.content) == (206, whole.content[4:10])


def test_a_child_that_fails_leaves_no_answer(tmp_path: Path) -> None:
    damaged = tmp_path / "a.mkv"
    write_ffv1(damaged, FRAMES, fps=8.0, metadata=METADATA)
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(ConversionError, match="dicom of this video cannot be made"):
        convert(Form.DICOM, damaged, modality="US", settings=Settings())


def test_a_video_without_marks_is_not_converted(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", FRAMES, fps=8.0)
    with pytest.raises(ConversionError):
        convert(Form.PREVIEW, tmp_path / "a.mp4", modality="US", settings=Settings())
