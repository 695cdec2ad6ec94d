"""What leaves the server says that it is synthetic: every file is checked before anybody can ask for it."""

import json
from pathlib import Path

from PIL import Image

from medsora.errors import VideoError
from medsora.provenance import DIGITAL_SOURCE_TYPE, SYNTHETIC_NOTE
from medsora.video_io import VideoInfo, probe_video

__all__ = ["check_mark"]

_IMAGE_DESCRIPTION = 0x010E  # Exif


def check_mark(path: Path, info: VideoInfo | None = None) -> None:
    """Refuse a file that does not say, where everybody looks, that it is synthetic.

    Args:
        path: A video (MP4, Matroska), a picture (WebP, JPEG, PNG), a DICOM file or JSON.
        info: What :func:`medsora.video_io.probe_video` tells of the video, where that has been asked.

    Raises:
        VideoError: It does not.
    """
    if path.suffix == ".json":
        is_marked = _is_origin(path.read_text())
    elif path.suffix in (".mp4", ".mkv"):
        is_marked = _is_origin((info or probe_video(path)).metadata.get("comment", ""))
    elif path.suffix == ".png":
        with Image.open(path) as image:
            is_marked = _is_origin(str(image.info.get("Comment", "")))
    elif path.suffix == ".dcm":
        from pydicom import dcmread  # which takes a while, and most workers need it never

        is_marked = dcmread(path, stop_before_pixels=True).get("SyntheticData") == "YES"
    else:
        with Image.open(path) as image:
            described = image.getexif().get(_IMAGE_DESCRIPTION)
            packet = image.info.get("xmp", b"")
        is_marked = described == SYNTHETIC_NOTE and DIGITAL_SOURCE_TYPE.encode() in packet
    if not is_marked:
        raise VideoError(f"{path.name}: does not say that it is synthetic")


def _is_origin(text: str) -> bool:
    try:
        origin = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(origin, dict)
        and origin.get("synthetic") is True
        and origin.get("digital_source_type") == DIGITAL_SOURCE_TYPE
    )
