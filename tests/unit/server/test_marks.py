"""Every file says that it is synthetic, or is not published; a signed one tells of any change (F42)."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pydicom
import pytest
from c2pa import Reader
from certificates import Authority
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from medsora.clip_files import write_clip
from medsora.errors import VideoError
from medsora.provenance import SYNTHETIC_NOTE, clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import probe_video, write_ffv1, write_mp4
from server.settings import Settings, SettingsError
from server.worker.marks import check_mark
from server.worker.signing import check_signature, sign_file, signer_of
from server.worker.stills import write_preview, write_spritesheet, write_thumbnail

FRAMES = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
REQUEST = GenerationRequest(
    label="covid-convex", seed=1, num_frames=16, height=64, width=64, num_inference_steps=4, guidance_scale=1.0,
    sampler="euler",
)  # fmt: skip
METADATA = clip_metadata(REQUEST, model="tiny", model_sha256="0" * 64)
NAMES = ("clip.mp4", "clip.mkv", "clip.dcm", "preview.webp", "still.webp", "sheet.jpg")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in NAMES}
    write_mp4(paths["clip.mp4"], FRAMES, fps=8.0, metadata=METADATA)
    write_ffv1(paths["clip.mkv"], FRAMES, fps=8.0, metadata=METADATA)
    write_clip(paths["clip.dcm"], FRAMES, clip_format="dicom", fps=8.0, metadata=METADATA, modality="US")
    write_preview(paths["preview.webp"], FRAMES, fps=8.0, metadata=METADATA)
    write_thumbnail(paths["still.webp"], FRAMES, metadata=METADATA)
    write_spritesheet(paths["sheet.jpg"], FRAMES, metadata=METADATA)
    return paths


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with a certificate chain of a test authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority()
    issued = authority.issue("signer.example.com", ExtendedKeyUsageOID.EMAIL_PROTECTION)
    (folder / "chain.pem").write_bytes(issued.certificate + authority.certificate)
    (folder / "key.pem").write_bytes(issued.key)
    return Settings(c2pa_certificate=folder / "chain.pem", c2pa_private_key=folder / "key.pem")


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_written_is_marked(files: dict[str, Path], name: str) -> None:
    check_mark(files[name])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_video_that_lost_its_mark(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    bare = tmp_path / f"bare{Path(name).suffix}"
    with av.open(str(files[name])) as source, av.open(str(bare), "w") as target:  # the same stream in a new container
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    assert probe_video(bare).num_frames == 16
    with pytest.raises(VideoError, match="does not say that it is synthetic"):
        check_mark(bare)


def test_dicom_that_lost_its_mark(files: dict[str, Path]) -> None:
    with_mark = pydicom.dcmread(files["clip.dcm"])
    with_mark.SyntheticData = "NO"
    with_mark.save_as(files["clip.dcm"])
    with pytest.raises(VideoError, match="does not say"):
        check_mark(files["clip.dcm"])


@pytest.mark.parametrize("name", ["preview.webp", "still.webp", "sheet.jpg"])
def test_picture_that_lost_its_mark(files: dict[str, Path], name: str) -> None:
    with Image.open(files[name]) as image:
        image.load()
        bare = Image.fromarray(np.asarray(image))
    bare.save(files[name])
    with pytest.raises(VideoError, match="does not say"):
        check_mark(files[name])


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "[]",
        "null",
        '{"synthetic": false}',
        '{"synthetic": true}',
        '{"synthetic": 1, "digital_source_type": "trainedAlgorithmicMedia"}',
    ],
)
def test_marks_that_say_something_else(tmp_path: Path, comment: str) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, FRAMES, fps=8.0, metadata={**METADATA, "comment": comment} if comment else None)
    with pytest.raises(VideoError, match="does not say"):
        check_mark(path)


@pytest.mark.parametrize("name", ["clip.mp4", "preview.webp", "still.webp", "sheet.jpg"])
def test_signed_files_are_valid_under_the_reference_reader(
    files: dict[str, Path], signing: Settings, name: str
) -> None:
    path = files[name]
    signer = signer_of(signing)
    assert signer is not None
    with pytest.raises(VideoError, match="no C2PA manifest"):
        check_signature(path)
    size = path.stat().st_size
    sign_file(path, signer, title="a title")
    assert path.stat().st_size < size + 20_000  # no picture of the file within the file
    check_signature(path)
    check_mark(path)  # the container's own mark is still there
    with Reader(path) as reader:
        assert reader.get_validation_state() == "Valid"
        told = json.loads(reader.json())
        manifest: dict[str, Any] = told["manifests"][told["active_manifest"]]
        problems = {status["code"] for status in told.get("validation_status", [])}
    assert problems <= {"signingCredential.untrusted"}  # of an authority that nobody has heard of
    (action,) = [
        one for a in manifest["assertions"] if a["label"].startswith("c2pa.actions") for one in a["data"]["actions"]
    ]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert manifest["title"] == "a title"
    if name == "clip.mp4":
        assert probe_video(path).num_frames == 16
    else:
        with Image.open(path) as image:
            image.load()


def test_a_changed_byte_is_told(files: dict[str, Path], signing: Settings, tmp_path: Path) -> None:
    signer = signer_of(signing)
    assert signer is not None
    path = files["clip.mp4"]
    sign_file(path, signer, title="t")
    content = bytearray(path.read_bytes())
    place = content.rindex(b"mdat") + 200
    content[place] ^= 1
    changed = tmp_path / "changed.mp4"
    changed.write_bytes(content)
    with pytest.raises(VideoError, match="manifest is Invalid"):
        check_signature(changed)
    check_signature(path)


def test_settings_that_cannot_sign(signing: Settings, tmp_path: Path) -> None:
    assert signer_of(Settings()) is None
    assert signing.c2pa_certificate is not None
    with pytest.raises(ValueError, match="set together"):
        Settings(c2pa_certificate=signing.c2pa_certificate)
    missing = signing.model_copy(update={"c2pa_private_key": tmp_path / "none.pem"})
    with pytest.raises(SettingsError, match=r"none\.pem cannot be read"):
        signer_of(missing)
    wrong = tmp_path / "wrong.pem"
    shutil.copy(signing.c2pa_certificate, wrong)
    with pytest.raises(SettingsError, match="cannot be used"):
        signer_of(signing.model_copy(update={"c2pa_private_key": wrong}))


def test_note_says_what_it_is() -> None:
    assert "Synthetic" in SYNTHETIC_NOTE
    assert "not for diagnosis" in SYNTHETIC_NOTE
