"""Files of single clips, in each format of a dataset, and what is measured of the frames in them. Torch-free.

Every writer gives the same bytes for the same frames and metadata on the same versions of the libraries. A clip is one
file, or several that lie behind one another in it (the frames of ``png``): its parts.
"""

import hashlib
import io
import json
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from medsora.errors import MedsoraError
from medsora.video_io import write_ffv1, write_mp4

__all__ = [
    "CLIP_FORMATS",
    "ClipPart",
    "frames_sha256",
    "mean_motion",
    "write_clip",
]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

CLIP_FORMATS = {"mp4": ".mp4", "ffv1": ".mkv", "png": "", "dicom": ".dcm"}
"""Format -> ending of the name; of ``png`` a clip is a folder."""
_TRUE_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"  # Multi-frame True Color Secondary Capture Image Storage
_IMPLEMENTATION = "2.25.302891143117046817041417264402216401857"


@dataclass(frozen=True, kw_only=True)
class ClipPart:
    """A part of a clip's file, which becomes a file of its own in an archive."""

    name: str
    """Behind the clip's name: ``.mp4``, or ``/frame_0003.png``."""
    size_bytes: int
    crc32: int
    sha256: str
    unsigned_sha256: str | None = None
    """Of a file that carries a C2PA manifest: its hash before that was put in, by which it can be made again."""

    @classmethod
    def of(cls, name: str, content: bytes, *, unsigned_sha256: str | None = None) -> "ClipPart":
        """A part of these bytes."""
        digest = hashlib.sha256(content).hexdigest()
        crc32 = zlib.crc32(content)
        return cls(name=name, size_bytes=len(content), crc32=crc32, sha256=digest, unsigned_sha256=unsigned_sha256)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary, without what it has not."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_clip(
    path: Path, frames: Frames, *, clip_format: str, fps: float, metadata: Mapping[str, str], modality: str
) -> list[ClipPart]:
    """Write the file of a clip and describe its parts, in the order in which they lie in it.

    Args:
        path: Overwritten when it exists.
        frames: uint8 RGB ``(frames, height, width, 3)``.
        clip_format: Of :data:`CLIP_FORMATS`. All but ``mp4`` are exact to the bit.
        fps: Frames a second, above 0.
        metadata: Of :func:`medsora.provenance.clip_metadata`.
        modality: DICOM modality, such as ``US``; used by ``dicom`` alone.

    Raises:
        VideoError: The frames cannot be encoded.
        MedsoraError: No such format, or a package is missing.
        OSError: The file cannot be written.
    """
    if clip_format == "mp4":
        write_mp4(path, frames, fps=fps, metadata=metadata)
    elif clip_format == "ffv1":
        write_ffv1(path, frames, fps=fps, metadata=metadata)
    elif clip_format == "dicom":
        _write_dicom(path, frames, fps=fps, metadata=metadata, modality=modality)
    elif clip_format == "png":
        pictures = [_png(frame, metadata) for frame in frames]
        path.write_bytes(b"".join(pictures))
        return [ClipPart.of(f"/frame_{number:04d}.png", picture) for number, picture in enumerate(pictures)]
    else:
        raise MedsoraError(f"there is no format {clip_format!r} of clips; allowed: {', '.join(CLIP_FORMATS)}")
    return [ClipPart.of(CLIP_FORMATS[clip_format], path.read_bytes())]


def frames_sha256(frames: Frames) -> str:
    """SHA-256 of the pixels, frame by frame and row by row, as they were before any encoder."""
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def mean_motion(frames: Frames) -> float:
    """Mean absolute change of a pixel's grey level (0 to 255) from one frame to the next; 0 of a single frame."""
    if len(frames) < 2:
        return 0.0
    grey = frames.astype(np.float32).mean(axis=-1)
    return float(np.abs(np.diff(grey, axis=0)).mean())


def _png(frame: Frames, metadata: Mapping[str, str]) -> bytes:
    notes = PngImagePlugin.PngInfo()
    for name in ("title", "comment", "description"):
        notes.add_text(name.capitalize(), metadata[name])
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, format="PNG", compress_level=6, pnginfo=notes)
    return buffer.getvalue()


def _write_dicom(path: Path, frames: Frames, *, fps: float, metadata: Mapping[str, str], modality: str) -> None:
    """Uncompressed RGB, as Multi-frame True Color Secondary Capture. It is of nobody: there is no patient in it."""
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import UID, ExplicitVRLittleEndian
    except ModuleNotFoundError as error:
        raise MedsoraError(f"DICOM needs the package {error.name}: pip install 'medsora[model]'") from error
    origin = json.loads(metadata["comment"])
    source = f"{metadata['comment']} {frames_sha256(frames)}"

    def uid(of: str) -> Any:
        # of the UUID kind: new for each clip, and the same whenever the clip is made again
        return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{of} {source}').int}")

    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = UID(_TRUE_COLOUR)
    meta.MediaStorageSOPInstanceUID = uid("instance")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    meta.ImplementationVersionName = "MEDSORA"
    ds = Dataset()
    ds.file_meta = meta
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SyntheticData = "YES"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.ContentDate = ds.ContentTime = ""
    ds.Modality = modality
    ds.ConversionType = "SYN"
    ds.Manufacturer = "MedSora"
    ds.ManufacturerModelName = _short(str(origin["model"]))
    ds.SecondaryCaptureDeviceManufacturer = "MedSora"
    ds.SeriesDescription = _short(f"Synthetic: {origin['label']}")
    ds.DerivationDescription = _short(f"{metadata['description']} {metadata['comment']}", 1024)
    ds.PatientName = ds.PatientID = ds.PatientBirthDate = ds.PatientSex = ""
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study"), uid("series")
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "", 1, 1
    ds.Laterality = ds.PatientOrientation = None
    ds.FrameTime = f"{1000 / fps:.10g}"
    ds.NumberOfFrames, ds.Rows, ds.Columns = len(frames), frames.shape[1], frames.shape[2]
    ds.FrameIncrementPointer = 0x00181063  # Frame Time
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    content = np.ascontiguousarray(frames).tobytes()
    ds.PixelData = content + b"\0" * (len(content) % 2)
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)


def _short(text: str, most: int = 64) -> str:
    """Text that fits: a backslash would separate values."""
    return text.replace("\\", "/")[:most]
