"""Frames of a multi-frame DICOM file as uint8 RGB, whatever their photometric interpretation. Torch-free."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import iter_pixels

from training.errors import DataError
from training.prepare.deidentify import DicomFacts

__all__ = ["dicom_facts", "dicom_frames", "is_dicom"]

COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "YBR_PARTIAL_422")
GREYS = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_facts(header: Dataset) -> DicomFacts:
    """What is used of a header.

    Raises:
        ValueError: An element that should be a number is none.
    """
    return DicomFacts(
        num_frames=int(header.get("NumberOfFrames") or 1),
        rows=int(header.get("Rows") or 0),
        columns=int(header.get("Columns") or 0),
        fps=_fps(header),
        modality=str(header.get("Modality") or ""),
        burned_in=str(header.get("BurnedInAnnotation") or "").strip().upper(),
    )


def _fps(header: Dataset) -> float | None:
    """Frames a second from FrameTime, FrameTimeVector, CineRate or RecommendedDisplayFrameRate, in this order."""
    vector = header.get("FrameTimeVector")
    times = [float(value) for value in vector][1:] if vector is not None and len(vector) > 1 else []
    frame_time_ms = float(header.get("FrameTime") or 0) or (sum(times) / len(times) if times else 0.0)
    if frame_time_ms > 0:
        return 1000.0 / frame_time_ms
    rate = float(header.get("CineRate") or 0) or float(header.get("RecommendedDisplayFrameRate") or 0)
    return rate if rate > 0 else None


def dicom_frames(path: Path) -> Iterator[np.ndarray]:
    """Decode frame by frame.

    Grey values of more than 8 bits go through the file's modality and window settings, or where it has none, from
    the least to the largest value of all its frames; MONOCHROME1 is inverted, so that white is always bright.

    Returns:
        uint8 RGB (height, width, 3) each.

    Raises:
        DataError: A transfer syntax or photometric interpretation that cannot be decoded here, or damaged data.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        kind = str(header.get("PhotometricInterpretation") or "")
        if kind in COLOURS:
            for frame in iter_pixels(path):
                yield _colour(frame)
        elif kind == "PALETTE COLOR":
            for frame in iter_pixels(path):
                colour = apply_color_lut(frame, header)
                yield _colour(colour if colour.dtype == np.uint8 else (colour >> 8).astype(np.uint8))
        elif kind in GREYS:
            yield from _grey_frames(path, header, is_inverted=kind == "MONOCHROME1")
        else:
            raise DataError(f"photometric interpretation {kind!r} is not supported")
    except DataError:
        raise
    except Exception as error:  # its decoders raise anything, up to what a codec library raises
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _colour(frame: np.ndarray) -> np.ndarray:
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
        raise DataError(f"colour frames must be 8-bit with three channels, got {frame.dtype} {frame.shape}")
    return np.ascontiguousarray(frame)


def _grey_frames(path: Path, header: Dataset, *, is_inverted: bool) -> Iterator[np.ndarray]:
    low, high = _grey_range(path, header)
    for frame in iter_pixels(path):
        values = _windowed(frame, header)
        grey = np.clip((values - low) * (255.0 / max(high - low, 1e-9)), 0, 255).round().astype(np.uint8)
        if is_inverted:
            grey = 255 - grey
        yield np.repeat(grey[..., None], 3, axis=-1)


def _windowed(frame: np.ndarray, header: Dataset) -> np.ndarray:
    values: Any = apply_modality_lut(frame, header)
    if "WindowCenter" in header or "VOILUTSequence" in header:
        values = apply_voi_lut(values, header)
    return np.asarray(values, dtype=np.float64)


def _grey_range(path: Path, header: Dataset) -> tuple[float, float]:
    """Values that become black and white."""
    bits, is_signed = int(header.BitsStored), bool(header.get("PixelRepresentation", 0))
    has_window = "WindowCenter" in header or "VOILUTSequence" in header
    if bits == 8 and not is_signed and not has_window and "RescaleSlope" not in header:
        return 0.0, 255.0
    if "WindowCenter" in header and "VOILUTSequence" not in header:
        # the windowing function's own output range, whatever is in the frames
        full = _windowed(np.array([[-(2**31), 2**31 - 1]], dtype=np.float64), header)
        return float(full.min()), float(full.max())
    low, high = np.inf, -np.inf
    for frame in iter_pixels(path):
        values = _windowed(frame, header)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high
