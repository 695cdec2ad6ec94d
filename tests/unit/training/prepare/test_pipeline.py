"""The whole way: what goes in comes out, the same every time, whole or not at all, and nothing is lost in silence."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsora.video_io import read_video, write_mp4
from training.errors import DataError
from training.prepare.cache import open_cache
from training.prepare.config import Box, PrepareConfig
from training.prepare.pipeline import prepare

Put = Callable[..., Path]
CONFIG = PrepareConfig(height=48, width=64, min_frames=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, put_video: Put, texture: Callable[..., np.ndarray]) -> Path:
    """Two labels with four videos each, one with a cut, one cut off, and files that are no videos."""
    root = tmp_path_factory.mktemp("source")
    for label in ("normal", "polyp"):
        for number in range(4):
            put_video(root / label / f"case{number}.mp4", 10 * number + (label == "polyp"), 20)
    two = np.concatenate([texture(70, 12), texture(71, 13)])
    write_mp4(root / "polyp" / "case0.mp4", two, fps=16.0, crf=10)
    whole = (root / "normal" / "case0.mp4").read_bytes()
    (root / "normal" / "cut_off.mp4").write_bytes(whole[: len(whole) // 3])
    (root / "normal" / "empty.mp4").write_bytes(b"")
    put_video(root / "normal" / "short.mp4", 99, 4)
    (root / "notes.txt").write_text("about", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "cache"
    prepare(source, out, CONFIG)
    return out


def hashes(out: Path) -> dict[str, str]:
    return {name: record.sha256 for name, record in open_cache(out).index.shards.items()}


def test_frames_come_out_as_they_are(source: Path, made: Path) -> None:
    cache = open_cache(made)
    assert len(cache.index.clips) == 8
    for clip, frames in cache.iterate(cache.index.clips):
        expected, fps = read_video(source / clip.name)
        assert np.array_equal(frames, expected)
        assert (clip.fps, clip.frames) == (fps, len(expected))
    assert {clip.name: clip.cuts for clip in cache.index.clips if clip.cuts} == {"polyp/case0.mp4": (12,)}
    assert cache.index.conditions == {"label": ("normal", "polyp")}
    assert {clip.split for clip in cache.index.clips} == {"train", "test"}
    assert cache.verify() > 8 * 20 * 48 * 64 * 3


def test_everything_left_out_is_named(made: Path) -> None:
    report = json.loads((made / "report.json").read_text(encoding="utf-8"))
    reasons = {entry["name"]: entry["reason"] for entry in report["skipped"]}
    assert set(reasons) == {"normal/cut_off.mp4", "normal/empty.mp4", "normal/short.mp4"}
    assert report["skipped_count"] == 3
    assert "has 4 frames that can be used, fewer than min_frames=5" in reasons["normal/short.mp4"]
    assert report["ignored"] == ["notes.txt"]
    assert report["items"] == 11
    html = (made / "report.html").read_text(encoding="utf-8")
    assert all(name in html for name in reasons)


def test_the_same_again_to_the_bit(source: Path, made: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "again", CONFIG, workers=4)
    for file in sorted(path.name for path in made.iterdir()):
        assert (made / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    other = dataclasses.replace(CONFIG, seed=7)
    prepare(source, tmp_path / "other", other)
    assert open_cache(tmp_path / "other").sha256 != open_cache(made).sha256


class StoppedError(Exception):
    pass


def test_a_stopped_run_leaves_nothing_and_is_gone_on_with(source: Path, made: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "cache", dataclasses.replace(CONFIG, shard_mib=1)

    def stop(stage: str, done: int, total: int, name: str) -> None:
        if (stage, done) == ("writing", 6):
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare(source, out, config, progress=stop)
    assert not out.exists()
    partial = tmp_path / ".cache.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert finished
    prepare(source, out, config)
    assert not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    frames = {clip.name: pixels for clip, pixels in open_cache(made).iterate(open_cache(made).index.clips)}
    cache = open_cache(out)
    assert len(cache.index.shards) > 2  # clips go on from one shard to the next
    assert any(len(clip.spans) > 1 for clip in cache.index.clips)
    assert all(np.array_equal(pixels, frames[clip.name]) for clip, pixels in cache.iterate(cache.index.clips))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.json", "report.json", "report.html", *cache.index.shards]
    )


def test_other_settings_do_not_go_on_with_it(source: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, name: str) -> None:
        if stage == "writing" and done == total:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare(source, tmp_path / "c", CONFIG, progress=stop)
    stale = (tmp_path / ".c.partial" / "train-00000.safetensors").stat().st_mtime_ns
    prepare(source, tmp_path / "c", dataclasses.replace(CONFIG, fit="stretch"))
    assert (tmp_path / "c" / "train-00000.safetensors").stat().st_mtime_ns != stale


def test_a_cache_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    (out / "mine").mkdir(parents=True)
    with pytest.raises(DataError, match="is there and is no prepared cache"):
        prepare(source, out, CONFIG, is_replacing=True)
    (out / "mine").rmdir()
    out.rmdir()
    prepare(source, out, CONFIG)
    before = hashes(out)
    with pytest.raises(DataError, match="replace it with --replace"):
        prepare(source, out, CONFIG)
    assert hashes(out) == before
    prepare(source, out, dataclasses.replace(CONFIG, seed=5), is_replacing=True)
    assert open_cache(out).index.settings["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_dry_run_writes_the_report_alone(source: Path, made: Path, tmp_path: Path) -> None:
    result = prepare(source, tmp_path / "none", CONFIG, is_dry_run=True, html=tmp_path / "r" / "dry.html")
    assert result.path is None
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    report = json.loads((made / "report.json").read_text(encoding="utf-8"))
    del report["cache_sha256"]
    assert result.report == report
    assert "(dry run)" in (tmp_path / "r" / "dry.html").read_text(encoding="utf-8")


def test_sizes_and_fits(put_video: Put, tmp_path: Path) -> None:
    put_video(tmp_path / "s" / "a.mp4", 1, 20, height=48, width=96)
    whole, _ = read_video(tmp_path / "s" / "a.mp4")
    made = {}
    for fit in ("crop", "pad", "stretch"):
        config = PrepareConfig(height=24, width=24, fit=fit)
        prepare(tmp_path / "s", tmp_path / fit, config)
        ((_, made[fit]),) = open_cache(tmp_path / fit).iterate(open_cache(tmp_path / fit).index.clips)
    middle = Image.fromarray(whole[3]).crop((24, 0, 72, 48)).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.abs(made["crop"][3].astype(int) - np.asarray(middle)).mean() < 0.5
    assert not made["pad"][:, :6].any()
    assert not made["pad"][:, 18:].any()
    assert made["pad"][:, 7:17].any()
    small = Image.fromarray(whole[3]).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(made["stretch"][3], np.asarray(small))


def test_borders_masks_black_frames_and_gaps(texture: Callable[..., np.ndarray], tmp_path: Path) -> None:
    clip = np.maximum(texture(3, 24, height=48, width=48), 30)
    clip[:, :, :8] = 0  # a border
    clip[9:11] = 0  # out of the body
    folder = tmp_path / "s" / "a"
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        if number != 15:
            Image.fromarray(frame).save(folder / f"{number:03d}.png")
    (folder / "017.png").write_bytes(b"no picture")
    config = PrepareConfig(
        height=48, width=40, fps=10.0, crop_borders=True, masks=(Box(left=40, top=40, width=20, height=20),)
    )
    result = prepare(tmp_path / "s", tmp_path / "c", config)
    ((cached, frames),) = open_cache(tmp_path / "c").iterate(open_cache(tmp_path / "c").index.clips)
    kept = [number for number in range(24) if number not in (9, 10, 15, 17)]
    expected = clip[kept][:, :, 8:].copy()
    expected[:, 40:, 32:] = 0
    assert np.array_equal(frames, expected)
    # where frames are missing, a scene begins
    assert cached.cuts == (kept.index(11), kept.index(16), kept.index(18))
    assert result.report["black_frames"] == {"a": 2}
    assert result.report["borders"][0]["picture"] == {"left": 8, "top": 0, "width": 40, "height": 48}
    assert [entry["name"] for entry in result.report["skipped"]] == ["a/017.png"]


def test_thinning_out_keeps_every_nth_frame(put_video: Put, tmp_path: Path) -> None:
    video = put_video(tmp_path / "s" / "a.mp4", 1, 60, fps=30.0)
    prepare(tmp_path / "s", tmp_path / "c", dataclasses.replace(CONFIG, max_fps=10.0))
    ((clip, frames),) = open_cache(tmp_path / "c").iterate(open_cache(tmp_path / "c").index.clips)
    assert np.array_equal(frames, read_video(video)[0][::3])
    assert clip.fps == 10.0


def test_segments_of_one_video_become_clips(put_video: Put, tmp_path: Path) -> None:
    put_video(tmp_path / "a.mp4", 1, 40)
    table = tmp_path / "t.csv"
    table.write_text(
        "file,label,split,start_frame,end_frame,cuts\na.mp4,x,train,5,14,8\na.mp4,y,train,20,,\n", encoding="utf-8"
    )
    prepare(table, tmp_path / "c", CONFIG)
    cache = open_cache(tmp_path / "c")
    whole, _ = read_video(tmp_path / "a.mp4")
    found = {clip.name: (clip, frames) for clip, frames in cache.iterate(cache.index.clips)}
    assert list(found) == ["a.mp4#5-14", "a.mp4#20-"]
    assert np.array_equal(found["a.mp4#5-14"][1], whole[5:15])
    assert np.array_equal(found["a.mp4#20-"][1], whole[20:])
    assert found["a.mp4#5-14"][0].cuts == (3,)


def test_copies_go_to_one_side(put_video: Put, tmp_path: Path) -> None:
    for name, seed in (("train/a.mp4", 1), ("train/b.mp4", 2), ("test/c.mp4", 1), ("test/d.mp4", 3)):
        put_video(tmp_path / "s" / name, seed, 20)
    report = prepare(tmp_path / "s", tmp_path / "c", CONFIG).report
    assert [(pair["first"], pair["second"]) for pair in report["duplicates"]] == [("test/c.mp4", "train/a.mp4")]
    splits = {clip.name: clip.split for clip in open_cache(tmp_path / "c").index.clips}
    assert splits == {"train/a.mp4": "train", "train/b.mp4": "train", "test/c.mp4": "train", "test/d.mp4": "test"}
    dropping = dataclasses.replace(CONFIG, duplicates="drop")
    report = prepare(tmp_path / "s", tmp_path / "d", dropping).report
    assert report["skipped"] == [
        {"name": "train/a.mp4", "reason": "shows the same as test/c.mp4 of the test split", "count": 1}
    ]


def test_excluded_labels_and_clear_errors(source: Path, put_video: Put, tmp_path: Path) -> None:
    result = prepare(source, tmp_path / "x", dataclasses.replace(CONFIG, excluded_labels=("polyp",)), is_dry_run=True)
    assert result.report["conditions"] == {"label": ["normal"]}
    with pytest.raises(DataError, match="excluded_labels names cyst; there are: normal, polyp"):
        prepare(source, tmp_path / "x", dataclasses.replace(CONFIG, excluded_labels=("cyst",)), is_dry_run=True)
    with pytest.raises(DataError, match=r"nothing of .* can be used\. .*fewer than min_frames=500"):
        prepare(source, tmp_path / "x", dataclasses.replace(CONFIG, min_frames=500), is_dry_run=True)
    crop = Box(left=60, top=0, width=10, height=10)
    with pytest.raises(DataError, match="crop 60,0,10,10 does not lie in its frames of 64x48 pixels"):
        prepare(source, tmp_path / "x", dataclasses.replace(CONFIG, crop=crop), is_dry_run=True)
