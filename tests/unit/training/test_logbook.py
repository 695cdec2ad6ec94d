"""What a run writes down: lines without doubles, curves, and videos that move."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.logbook import Logbook, encode_gif


def events_of(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def squares() -> np.ndarray:
    """A white square that moves one column a frame: 5 frames of 16x12."""
    frames = np.zeros((5, 12, 16, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[4:8, index : index + 4] = 255
    return frames


def test_a_gif_has_all_frames_their_pixels_and_their_pace() -> None:
    frames = squares()
    with Image.open(io.BytesIO(encode_gif(frames, fps=8.0))) as image:
        assert image.format == "GIF"
        assert image.n_frames == 5
        assert image.info["loop"] == 0
        for index, frame in enumerate(frames):
            image.seek(index)
            assert image.info["duration"] == pytest.approx(125, abs=10)
            np.testing.assert_allclose(np.asarray(image.convert("RGB")).astype(int), frame, atol=3)


def test_lines_curves_and_videos(tmp_path: Path) -> None:
    with Logbook(tmp_path, step=0) as log:
        log.write(3, 1.26, {"loss": 0.5})
        log.plot(3, "training", {"loss": 0.5})
        log.plot(4, "training", {"loss": 0.25})
        log.show(4, {"sample 0": squares()}, fps=8.0)
    assert json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8")) == {"step": 3, "seconds": 1.3, "loss": 0.5}
    events = events_of(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(3, 0.5), (4, 0.25)]
    (shown,) = events.Images("videos/sample 0")
    assert (shown.step, shown.width, shown.height) == (4, 16, 12)
    assert shown.encoded_image_string == encode_gif(squares(), fps=8.0)


def test_a_later_leg_takes_out_what_it_does_again(tmp_path: Path) -> None:
    with Logbook(tmp_path, step=0) as log:
        for step in (1, 2, 3):
            log.write(step, 0.0, {"loss": step})
            log.plot(step, "training", {"loss": step})
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "se')  # killed while it wrote
    with Logbook(tmp_path, step=2) as log:
        log.write(3, 0.0, {"loss": 30})
        log.plot(3, "training", {"loss": 30})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    assert [(event.step, event.value) for event in events_of(tmp_path).Scalars("training/loss")] == [
        (1, 1.0), (2, 2.0), (3, 30.0)
    ]  # fmt: skip


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Logbook(None, step=0) as log:
        log.write(1, 0.0, {"loss": 1.0})
        log.plot(1, "training", {"loss": 1.0})
        log.show(1, {"sample": squares()}, fps=8.0)
    assert list(tmp_path.iterdir()) == []
