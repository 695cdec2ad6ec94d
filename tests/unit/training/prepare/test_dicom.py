"""DICOM: pixels of every photometric interpretation, and de-identification that fails closed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, UltrasoundMultiFrameImageStorage, generate_uid

from training.errors import DataError
from training.prepare.config import Box, PrepareConfig
from training.prepare.deidentify import hash_patient, identifying_elements
from training.prepare.dicom import dicom_frames
from training.prepare.layouts import detect_layout, list_source
from training.prepare.pipeline import prepare

CONFIG = PrepareConfig(height=32, width=32)
CLEAN = {"BurnedInAnnotation": "NO", "FrameTime": "50", "Modality": "US"}
NAMED = CLEAN | {"PatientName": "Doe^John", "PatientID": "MRN-123456", "PatientBirthDate": "19700101"}
Texture = Callable[..., np.ndarray]


def put_dicom(path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", **tags: Any) -> Path:
    """Write frames: (frames, height, width) or with three channels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.as_posix()])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = "1.2.3"
    dataset.PhotometricInterpretation = kind
    dataset.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape[:3]
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def ramp(dtype: type = np.uint8, top: int = 200) -> np.ndarray:
    """Three frames, dark on the left, bright on the right, and brighter from frame to frame."""
    line = np.linspace(0, top, 24).astype(dtype)
    return np.stack([np.tile(line, (16, 1)) + np.array(step, dtype) for step in (0, 10, 20)])


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(dicom_frames(path)))


# pixels


def test_grey_and_inverted_grey(tmp_path: Path) -> None:
    plain = frames_of(put_dicom(tmp_path / "a.dcm", ramp()))
    assert plain.shape == (3, 16, 24, 3)
    assert np.array_equal(plain[..., 0], ramp())
    inverted = frames_of(put_dicom(tmp_path / "b.dcm", ramp(), "MONOCHROME1"))
    assert np.array_equal(inverted, 255 - plain)


def test_sixteen_bits_by_window_and_by_range(tmp_path: Path) -> None:
    deep = ramp(np.uint16, 4000)
    ranged = frames_of(put_dicom(tmp_path / "a.dcm", deep))
    # one range for the whole file: the first frame's black is black, the last one's white is white
    assert (ranged[0, 0, 0, 0], ranged[2, 0, -1, 0]) == (0, 255)
    assert ranged[0, 0, -1, 0] == round(4000 / 4020 * 255)
    window = {"WindowCenter": "1000", "WindowWidth": "2000", "RescaleSlope": "1", "RescaleIntercept": "0"}
    windowed = frames_of(put_dicom(tmp_path / "b.dcm", deep, **window))
    column = int(np.argmin(abs(deep[0, 0].astype(int) - 1000)))
    assert windowed[0, 0, column, 0] == pytest.approx(deep[0, 0, column] / 2000 * 255, abs=1)
    assert windowed[0, 0, -1, 0] == 255


def test_colours(tmp_path: Path, texture: Texture) -> None:
    clip = texture(1, 3, height=16, width=24)
    assert np.array_equal(frames_of(put_dicom(tmp_path / "rgb.dcm", clip, "RGB")), clip)
    planar = np.ascontiguousarray(clip.transpose(0, 3, 1, 2)).reshape(3, 16, 24, 3)
    assert np.array_equal(frames_of(put_dicom(tmp_path / "p.dcm", planar, "RGB", PlanarConfiguration=1)), clip)
    # a grey picture in YBR is its luminance, whatever the matrix
    grey = np.full((2, 16, 24, 3), 128, np.uint8)
    grey[..., 0] = np.linspace(0, 255, 24).astype(np.uint8)
    decoded = frames_of(put_dicom(tmp_path / "ybr.dcm", grey, "YBR_FULL"))
    assert np.abs(decoded.astype(int) - grey[..., :1]).max() <= 1
    # luminance 76, Cb 85, Cr 255: pure red (JFIF)
    red = np.tile(np.array([76, 85, 255], np.uint8), (2, 16, 24, 1))
    assert (
        np.abs(frames_of(put_dicom(tmp_path / "red.dcm", red, "YBR_FULL"))[0, 0, 0].astype(int) - [254, 0, 0]).max()
        <= 1
    )


def test_palette(tmp_path: Path) -> None:
    path = put_dicom(
        tmp_path / "a.dcm", ramp() % 4, "PALETTE COLOR",
        RedPaletteColorLookupTableDescriptor=[4, 0, 16], GreenPaletteColorLookupTableDescriptor=[4, 0, 16],
        BluePaletteColorLookupTableDescriptor=[4, 0, 16],
        RedPaletteColorLookupTableData=np.array([0, 65535, 0, 0], "<u2").tobytes(),
        GreenPaletteColorLookupTableData=np.array([0, 0, 65535, 0], "<u2").tobytes(),
        BluePaletteColorLookupTableData=np.array([0, 0, 0, 65535], "<u2").tobytes(),
    )  # fmt: skip
    index = (ramp() % 4)[0, 0]
    expected = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[index]
    assert np.array_equal(frames_of(path)[0, 0], expected)


def test_compressed_and_damaged(tmp_path: Path) -> None:
    path = put_dicom(tmp_path / "a.dcm", ramp())
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    assert np.array_equal(frames_of(tmp_path / "rle.dcm"), frames_of(path))
    (tmp_path / "short.dcm").write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match="cannot be decoded"):
        frames_of(tmp_path / "short.dcm")
    with pytest.raises(DataError, match="photometric interpretation 'HSV' is not supported"):
        frames_of(put_dicom(tmp_path / "hsv.dcm", np.zeros((2, 8, 8, 3), np.uint8), "HSV"))


# de-identification


def listed(root: Path, **changes: Any) -> Any:
    return list_source(root, dataclasses.replace(CONFIG, **changes))


def test_a_file_that_names_a_patient_is_refused_without_deidentify(tmp_path: Path) -> None:
    put_dicom(tmp_path / "a.dcm", ramp(), **NAMED)
    assert detect_layout(tmp_path) == "dicom"
    found = listed(tmp_path)
    assert found.items == ()
    (entry,) = found.skipped
    assert entry.name == "a.dcm"
    assert "names a patient (3 elements: PatientBirthDate, PatientID, PatientName); use --deidentify" in entry.reason
    assert "Doe" not in entry.reason


@pytest.mark.parametrize(("burned_in", "said"), [("YES", "is YES"), (None, "is missing")])
def test_pixels_that_may_show_a_name_are_refused(tmp_path: Path, burned_in: str | None, said: str) -> None:
    tags = {name: value for name, value in NAMED.items() if name != "BurnedInAnnotation"}
    if burned_in is not None:
        tags["BurnedInAnnotation"] = burned_in
    put_dicom(tmp_path / "a.dcm", ramp(), **tags)
    found = listed(tmp_path, deidentify=True)
    assert found.items == ()
    assert f"BurnedInAnnotation {said}" in found.skipped[0].reason
    for changes in (
        {"masks": (Box(left=0, top=0, width=24, height=4),)},
        {"crop": Box(left=0, top=4, width=24, height=12)},
        {"burned_in": "accept"},
    ):
        assert len(listed(tmp_path, deidentify=True, **changes).items) == 1


def test_what_stays_out_is_listed_and_nothing_of_it_gets_into_the_cache(tmp_path: Path, texture: Texture) -> None:
    source = tmp_path / "source"
    sequence = Dataset()
    sequence.RequestingPhysician = "House^Gregory"
    for index, patient in enumerate(("MRN-123456", "MRN-123456", "MRN-999")):
        tags = NAMED | {"PatientID": patient, "RequestAttributesSequence": [sequence]}
        clip = texture(index, 20, height=40, width=40, grey=True)[..., 0]
        path = put_dicom(source / ("normal", "covid", "normal")[index] / f"doe_{index}.dcm", clip, **tags)
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x00090010, "LO", "VENDOR")
        dataset.add_new(0x00091001, "LO", "secret stuff")
        dataset.save_as(path)
    out = tmp_path / "cache"
    made = prepare(source, out, dataclasses.replace(CONFIG, deidentify=True, splits="draw"))
    removed = made.report["removed_elements"]
    assert removed["PatientName"] == 3
    assert removed["RequestingPhysician"] == 3
    assert any(name.startswith("private element") for name in removed)
    content = b"".join(path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".json", ".html"))
    for secret in (b"Doe", b"doe_", b"MRN", b"123456", b"19700101", b"House", b"secret"):
        assert secret not in content
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert index["modality"] == "US"
    groups = {clip["name"]: clip["group"] for clip in index["clips"]}
    assert len(set(groups.values())) == 2
    assert all(name.startswith(group) for name, group in groups.items())
    assert {clip["fps"] for clip in index["clips"]} == {20.0}


def test_the_hash_of_a_patient_cannot_be_guessed_from_the_cache(tmp_path: Path) -> None:
    put_dicom(tmp_path / "a.dcm", ramp(), **NAMED)
    (item,) = listed(tmp_path, deidentify=True).items
    assert item.group != hash_patient("MRN-123456", "")
    assert listed(tmp_path, deidentify=True).items == (item,)
    salted = listed(tmp_path, deidentify=True, group_salt="ours").items[0]
    assert salted.group == hash_patient("MRN-123456", "ours") != item.group


def test_folders_of_patients_are_no_labels(tmp_path: Path) -> None:
    put_dicom(tmp_path / "Doe_John" / "a.dcm", ramp(), **NAMED)
    with pytest.raises(DataError, match="a folder is called after a patient") as raised:
        listed(tmp_path, deidentify=True)
    assert "Doe" not in str(raised.value)
    other = tmp_path / "other"
    for number in range(3):
        put_dicom(other / f"P{number}" / "a.dcm", ramp(), **(NAMED | {"PatientID": f"X-{number}", "PatientName": ""}))
    with pytest.raises(DataError, match="each of the 3 folders holds one patient"):
        listed(other, deidentify=True)
    assert len(listed(other, deidentify=True, label_columns=()).items) == 3


def test_single_frames_missing_rates_and_damage_are_named(tmp_path: Path) -> None:
    put_dicom(tmp_path / "one.dcm", ramp()[:1], **CLEAN)
    put_dicom(tmp_path / "rate.dcm", ramp(), BurnedInAnnotation="NO")
    put_dicom(tmp_path / "cine.dcm", ramp(), BurnedInAnnotation="NO", CineRate="30")
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    found = listed(tmp_path)
    assert [item.fps for item in found.items] == [30.0]
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert reasons["one.dcm"] == "is a single frame, no video"
    assert "does not say its frame rate" in reasons["rate.dcm"]
    assert set(reasons) == {"one.dcm", "rate.dcm", "bad.dcm"}


def test_every_name_counts_as_identifying() -> None:
    header = Dataset()
    header.OperatorsName = "Nurse^Ann"
    header.PatientSex = "F"
    header.Manufacturer = "ACME"
    header.StudyDescription = ""
    assert identifying_elements(header) == ("OperatorsName",)
