"""What the checks of ``medsora-train prepare`` find on real clips, and how fast they look.

    python benchmarks/prepare.py CLIPS_CSV

Cuts: pieces of clips of different patients are spliced, so that every cut is known; the same is run on the clips as
they are. Copies: frames are resized, compressed and compared with themselves, and with the frames of all other
patients. Overlays: letters are drawn on the clips before they are compressed. Prints one JSON object.
"""

import csv
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsora.video_io import read_video, write_mp4
from training.prepare.cuts import CutDetector, small_grey
from training.prepare.duplicates import find_duplicates, signature_of
from training.prepare.overlay import OverlayFinder

SPLICES, PIECES, SEED = 40, 8, 1
SIGNATURE_FRAMES = 64


def detected(greys: list[np.ndarray]) -> list[int]:
    detector = CutDetector()
    for grey in greys:
        detector.add(grey)
    return detector.cuts()


def measure_cuts(clips: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    right = found = planted = 0
    for _ in range(SPLICES):
        greys: list[np.ndarray] = []
        joints: set[int] = set()
        previous = None
        while len(joints) < PIECES - 1:
            clip = clips[int(rng.integers(len(clips)))]
            if previous is not None and clip["group"] == previous:
                continue
            length = min(int(rng.integers(8, 80)), len(clip["greys"]))
            start = int(rng.integers(0, len(clip["greys"]) - length + 1))
            if greys:
                joints.add(len(greys))
            greys += clip["greys"][start : start + length]
            previous = clip["group"]
        cuts = set(detected(greys))
        right, found, planted = right + len(cuts & joints), found + len(cuts), planted + len(joints)
    listed = {(clip["file"], cut) for clip in clips for cut in clip["cuts"]}
    seen = {(clip["file"], cut) for clip in clips for cut in detected(clip["greys"])}
    return {
        "spliced": {
            "cuts": planted, "found": found, "precision": round(right / found, 3), "recall": round(right / planted, 3),
        },
        "as_they_are": {
            "frames": sum(len(clip["greys"]) for clip in clips), "found": len(seen), "in_table": len(listed),
            "in_both": len(seen & listed),
        },
    }  # fmt: skip


def spread(values: list[np.ndarray], count: int) -> list[np.ndarray]:
    return [values[index] for index in np.unique(np.linspace(0, len(values) - 1, count).astype(int))]


def measure_copies(clips: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    signatures = [signature_of(spread(clip["greys"], SIGNATURE_FRAMES)) for clip in clips]
    pairs = find_duplicates(signatures, [f"{clip['dataset']}/{clip['group']}" for clip in clips])
    copies = []
    for clip in clips[::2]:
        frames, fps = read_video(clip["path"])
        small = np.stack([np.asarray(Image.fromarray(frame).resize((200, 160))) for frame in frames[10:90]])
        write_mp4(folder / "copy.mp4", small, fps=fps, crf=30)
        again, _ = read_video(folder / "copy.mp4")
        copy = signature_of(spread([small_grey(frame) for frame in again], SIGNATURE_FRAMES))
        found = find_duplicates([signature_of(spread(clip["greys"], SIGNATURE_FRAMES)), copy], ["clip", "copy"])
        copies.append(bool(found))
    return {
        "trimmed_resized_crf30": {"copies": len(copies), "found": sum(copies)},
        "pairs_of_different_groups": [[clips[pair.first]["file"], clips[pair.second]["file"]] for pair in pairs],
    }


def has_overlay(frames: np.ndarray) -> bool:
    finder = OverlayFinder()
    for frame in frames[:: max(1, len(frames) // 48)]:
        finder.add(frame)
    return bool(finder.boxes())


def measure_overlays(clips: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    plain, lettered = [], []
    for index, clip in enumerate(clips):
        frames, fps = read_video(clip["path"])
        plain.append(has_overlay(frames))
        if index % 2:
            continue
        drawn = []
        for frame in frames[:60]:
            image = Image.fromarray(frame).resize((384, 384))
            draw = ImageDraw.Draw(image)
            draw.text((8, 8), "DOE JOHN 1970-01-01", fill=(255, 255, 255), font=ImageFont.load_default(size=14))
            drawn.append(np.asarray(image))
        write_mp4(folder / "letters.mp4", np.stack(drawn), fps=fps, crf=23)
        lettered.append(has_overlay(read_video(folder / "letters.mp4")[0]))
    return {
        "as_they_are": {"clips": len(plain), "reported": sum(plain)},
        "with_letters_crf23": {"clips": len(lettered), "reported": sum(lettered)},
    }


def main(table: Path) -> None:
    clips: list[dict[str, Any]] = []
    seconds = 0.0
    with table.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            frames, _ = read_video(table.parent / row["file"])
            greys = [small_grey(frame) for frame in frames]
            started = time.perf_counter()
            detected(greys)
            seconds += time.perf_counter() - started
            clips.append(
                {"file": row["file"], "dataset": row["dataset"], "group": row["group"], "greys": greys,
                 "path": table.parent / row["file"], "cuts": [int(cut) for cut in row["cuts"].split()]}
            )  # fmt: skip
    rng = np.random.default_rng(SEED)
    by_set = {name: [clip for clip in clips if clip["dataset"] == name] for name in {clip["dataset"] for clip in clips}}
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "cuts": {name: measure_cuts(members, rng) for name, members in sorted(by_set.items())},
            "cut_detection_ms_a_frame": round(1000 * seconds / sum(len(clip["greys"]) for clip in clips), 2),
            "copies": measure_copies(clips, Path(folder)),
            "overlays": measure_overlays(clips, Path(folder)),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
