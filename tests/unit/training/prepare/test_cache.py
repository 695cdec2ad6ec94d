"""The cache: what is altered is noticed, and an index that lies is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.errors import DataError
from training.prepare.arrays import add_arrays, drop_arrays
from training.prepare.cache import CachedClip, is_cache, open_cache
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import prepare

Put = Callable[..., Path]


@pytest.fixture
def cache(put_video: Put, tmp_path: Path) -> Path:
    for label in ("a", "b"):
        for number in range(2):
            put_video(tmp_path / "source" / label / f"{number}.mp4", 10 * number + (label == "b"), 18)
    prepare(tmp_path / "source", tmp_path / "cache", PrepareConfig(height=24, width=32))
    return tmp_path / "cache"


def alter(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    change(tree)
    (cache / "index.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")


def test_an_altered_or_missing_shard_is_noticed(cache: Path) -> None:
    opened = open_cache(cache)
    assert is_cache(cache)
    assert opened.verify() > 0
    shard = cache / next(iter(opened.index.shards))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name} is not the file that the index names"):
        open_cache(cache).verify()
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read"):
        open_cache(cache).verify()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tree: tree.update(format_version=2), "format version 2"),
        (lambda tree: tree.update(format="other"), "is no prepared cache"),
        (lambda tree: tree.update(surprise=1), "unknown keys: surprise"),
        (lambda tree: tree["clips"].append(tree["clips"][0]), "is listed twice"),
        (lambda tree: tree["clips"][0].update(frames=19), "do not add up to its 19 frames"),
        (lambda tree: tree["clips"][0]["spans"][0].update(offset=5000), "lies outside of shard"),
        (lambda tree: tree["clips"][0]["spans"][0].update(offset=-1), "lies outside of shard"),
        (lambda tree: tree["clips"][0]["conditions"].update(label="c"), "a condition that the index does not list"),
        (lambda tree: tree["shards"].update({"../x.safetensors": tree["shards"].popitem()[1]}), "outside|plain file"),
    ],
)
def test_an_index_that_lies_is_refused(cache: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    alter(cache, change)
    with pytest.raises(DataError, match=problem):
        open_cache(cache)


def test_what_is_no_cache(tmp_path: Path) -> None:
    assert not is_cache(tmp_path)
    assert not is_cache(tmp_path / "nothing")
    with pytest.raises(DataError, match="no usable cache"):
        open_cache(tmp_path)
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="no usable cache"):
        open_cache(tmp_path)


# arrays


class Means:
    """A network small enough for a test: mean of every frame, times a weight."""

    def __init__(self, weight: float) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self, clip: CachedClip, frames: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        assert frames.shape == (clip.frames, 24, 32, 3)
        means = frames.mean(axis=(1, 2, 3)) * self.weight
        return {"features": means.astype(np.float16), "pairs": np.arange(len(frames) - 1)}


def test_arrays_are_made_once_for_each_network(cache: Path) -> None:
    before = open_cache(cache)
    one, other = Means(1.0), Means(2.0)
    record = add_arrays(cache, "flow", one, key="abc123", about={"network": "means"})
    assert one.calls == 4
    assert add_arrays(cache, "flow", one, key="abc123") == record
    assert one.calls == 4
    second = add_arrays(cache, "flow", other, key="def456")
    opened = open_cache(cache)
    assert opened.sha256 == before.sha256  # the frames are the same
    assert opened.find_arrays("flow", "none") is None
    for clip, frames in opened.iterate(opened.index.clips):
        for wanted, weight in ((record, 1.0), (second, 2.0)):
            found = opened.read_arrays(wanted)[clip.name]
            assert set(found) == {"features", "pairs"}
            np.testing.assert_allclose(found["features"], frames.mean(axis=(1, 2, 3)) * weight, rtol=1e-3)
    assert opened.verify() > before.verify()


def test_arrays_can_be_damaged_dropped_and_split_over_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prepare.arrays.MAX_FILE_BYTES", 100)
    record = add_arrays(cache, "flow", Means(1.0), key="abc")
    assert len(record.files) == 4
    assert len(open_cache(cache).read_arrays(record)) == 4
    file = cache / sorted(record.files)[1]
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="is not the file that the index names"):
        open_cache(cache).verify()
    assert drop_arrays(cache, "flow", "abc")
    assert not drop_arrays(cache, "flow", "abc")
    assert not list(cache.glob("flow-*"))
    assert open_cache(cache).verify() > 0


def test_a_function_that_fails_leaves_the_cache_as_it_was(cache: Path) -> None:
    index = (cache / "index.json").read_bytes()

    def fail(clip: CachedClip, frames: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        add_arrays(cache, "flow", fail, key="abc")
    assert (cache / "index.json").read_bytes() == index
    with pytest.raises(DataError, match="name of arrays must be letters"):
        add_arrays(cache, "../flow", Means(1.0), key="abc")
