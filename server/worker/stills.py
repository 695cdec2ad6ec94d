"""Pictures made from a clip: a thumbnail, a sheet of its frames, one that moves; each says that it is synthetic."""

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["MAX_TILES", "read_size", "sheet_layout", "write_preview", "write_spritesheet", "write_thumbnail"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

MAX_TILES = 64
_MOST_THUMBNAIL_PIXELS = 512
_MOST_TILE_PIXELS = 256
_IMAGE_DESCRIPTION = 0x010E  # Exif
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def write_thumbnail(path: Path, frames: Frames, *, metadata: Mapping[str, str]) -> None:
    """Write the middle frame as WebP, scaled down where a side has more than 512 pixels.

    Args:
        frames: uint8 RGB ``(frames, height, width, 3)``.
        metadata: Of :func:`medsora.provenance.clip_metadata`.

    Raises:
        OSError: The file cannot be written.
    """
    image = _scaled(frames[len(frames) // 2], _MOST_THUMBNAIL_PIXELS)
    image.save(path, format="WEBP", quality=85, method=4, **_marks(metadata))


def write_spritesheet(path: Path, frames: Frames, *, metadata: Mapping[str, str]) -> None:
    """Write frames of the clip as one JPEG, row by row from the top left; see :func:`sheet_layout`.

    Raises:
        OSError: The file cannot be written.
    """
    shown, columns, rows = sheet_layout(len(frames))
    tiles = [_scaled(frames[index], _MOST_TILE_PIXELS) for index in shown]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    sheet.save(path, format="JPEG", quality=88, **_marks(metadata))


def write_preview(path: Path, frames: Frames, *, fps: float, metadata: Mapping[str, str]) -> None:
    """Write the clip as an animated WebP that loops, in the clip's own time: the frames of a sheet, of its size.

    Raises:
        OSError: The file cannot be written.
    """
    shown, _, _ = sheet_layout(len(frames))
    first, *others = [_scaled(frames[index], _MOST_TILE_PIXELS) for index in shown]
    ends_ms = [round(1000 * index / fps) for index in [*shown[1:], len(frames)]]
    durations = [end - start for start, end in zip([0, *ends_ms], ends_ms, strict=False)]
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        quality=85,
        method=4,
        **_marks(metadata),
    )


def sheet_layout(num_frames: int) -> tuple[list[int], int, int]:
    """Frames that a sheet shows, its columns and its rows.

    Every frame up to 64, else 64 evenly spaced ones, the first and the last among them; as few columns as make the
    sheet at least as wide as high in tiles.

    >>> sheet_layout(5)
    ([0, 1, 2, 3, 4], 3, 2)
    """
    tiles = min(num_frames, MAX_TILES)
    shown = [int(index) for index in np.linspace(0, num_frames - 1, tiles).round()]
    columns = math.isqrt(tiles - 1) + 1
    return shown, columns, -(-tiles // columns)


def read_size(path: Path) -> tuple[int, int]:
    """Decode a picture and return its width and height.

    Raises:
        OSError: It is damaged or none.
    """
    with Image.open(path) as image:
        image.load()
        return image.size


def _scaled(frame: np.ndarray[Any, np.dtype[np.uint8]], most_pixels: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((most_pixels, most_pixels))  # keeps the proportions, never enlarges
    return image


def _marks(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Exif and XMP that say what the metadata of the video says."""
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = metadata["description"]
    packet = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:iptc="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"<iptc:DigitalSourceType>{_SOURCE_TYPES}trainedAlgorithmicMedia</iptc:DigitalSourceType>"
        f"<dc:title><rdf:Alt>{_language_default(metadata['title'])}</rdf:Alt></dc:title>"
        f"<dc:description><rdf:Alt>{_language_default(metadata['comment'])}</rdf:Alt></dc:description>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
    return {"exif": exif, "xmp": packet.encode()}


def _language_default(text: str) -> str:
    return f'<rdf:li xml:lang="x-default">{html.escape(text, quote=False)}</rdf:li>'
