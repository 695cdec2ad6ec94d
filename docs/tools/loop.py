"""Make the looping picture of the first page from a dataset that the server made of the shipped checkpoint.

python docs/tools/loop.py augmentation/generated.zip    # writes docs/images/loop.webp, a row a label

The archive is what examples/augment_classifier.py downloads: docs/augmentation.md has the command.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsora.video_io import read_video

PICTURE = Path(__file__).parents[1] / "images" / "loop.webp"
GAP, HEAD = 4, 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="ZIP of a dataset, format videofolder")
    parser.add_argument("--clips", type=int, default=6, help="of each label; the first ones, not chosen")
    parser.add_argument("--quality", type=int, default=70, help="of the WebP")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    rows, fps = read_clips(options.archive, options.clips)
    pictures = [draw(rows, index) for index in range(len(next(iter(rows.values()))[0]))]
    # there and back again would show motion that nobody generated: it jumps where it begins anew
    pictures[0].save(
        options.output,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=options.quality,
        method=4,
    )
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


def read_clips(archive: Path, most: int) -> tuple[dict[str, list[np.ndarray]], float]:
    """Frames of the first clips of each label, and their rate."""
    rows: dict[str, list[np.ndarray]] = {}
    fps = 0.0
    with zipfile.ZipFile(archive) as files, tempfile.TemporaryDirectory() as scratch:
        for line in files.read("manifest.jsonl").splitlines():
            clip = json.loads(line)
            row = rows.setdefault(clip["label"], [])
            if len(row) < most:
                frames, fps = read_video(Path(files.extract(clip["files"][0]["path"], scratch)))
                row.append(frames)
    return rows, fps


def draw(rows: dict[str, list[np.ndarray]], index: int) -> Image.Image:
    """One frame of all clips, each row under the name of its label."""
    clips = list(rows.values())
    height, width = clips[0][0].shape[1:3]
    picture = Image.new("RGB", (len(clips[0]) * (width + GAP) + GAP, len(rows) * (HEAD + height + GAP)), "#10161c")
    words = ImageDraw.Draw(picture)
    for number, (label, row) in enumerate(rows.items()):
        y = number * (HEAD + height + GAP)
        words.text((GAP, y + HEAD // 2), label, fill="#dbe4ec", font=ImageFont.load_default(12), anchor="lm")
        for column, clip in enumerate(row):
            picture.paste(Image.fromarray(clip[index]), (GAP + column * (width + GAP), y + HEAD))
    return picture


if __name__ == "__main__":
    main()
