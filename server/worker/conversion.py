"""Forms of a stored video that are made only when somebody asks for them. Run as a child of the API process.

``python -m server.worker.conversion FORM SOURCE MODALITY`` writes the file to standard output: ``dicom`` from the
lossless video, ``preview`` (animated WebP) from the lossless or the MP4. Torch-free.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from medsora.clip_files import write_clip
from medsora.video_io import probe_video, read_video
from server.children import limit_self
from server.conversion import LIMIT_BYTES, LIMIT_S
from server.settings import get_settings
from server.worker.marks import check_mark
from server.worker.signing import check_signature, sign_file, signer_of
from server.worker.stills import write_preview

__all__ = ["convert"]

_ENDINGS = {"dicom": ".dcm", "preview": ".webp"}


def convert(form: str, source: Path, folder: Path, *, modality: str) -> Path:
    """Make another form of a video, marked as the video is; returns the file, in ``folder``.

    Args:
        form: ``dicom`` or ``preview``.
        source: The stored video, MP4 or FFV1.
        modality: DICOM modality, such as ``US``; used by ``dicom`` alone.

    Raises:
        VideoError: The video is damaged, or what came of it is not marked.
        OSError: A file cannot be read or written.
    """
    path = folder / f"clip{_ENDINGS[form]}"
    frames, fps = read_video(source)
    metadata = probe_video(source).metadata
    if form == "dicom":
        write_clip(path, frames, clip_format="dicom", fps=fps, metadata=metadata, modality=modality)
    else:
        write_preview(path, frames, fps=fps, metadata=metadata)
        signer = signer_of(get_settings())
        if signer is not None:
            sign_file(path, signer, title=f"Synthetic preview {source.name.partition('.')[0]}")
            check_signature(path)
    check_mark(path)
    return path


def _main(form: str, source: Path, modality: str) -> None:
    limit_self(size_bytes=LIMIT_BYTES, cpu_s=LIMIT_S)
    with tempfile.TemporaryDirectory(prefix="medsora-form-") as folder:
        path = convert(form, source, Path(folder), modality=modality)
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
