"""Frame labels become clips: runs of one label, bridged flicker, and nothing lost without a word."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from training.prepare.segments import FrameLabel, label_runs, runs_to_segments


def labels(text: str, numbers: list[int] | None = None) -> list[FrameLabel]:
    places = numbers if numbers is not None else list(range(len(text)))
    return [FrameLabel(number, (("label", letter),)) for number, letter in zip(places, text, strict=True)]


def shown(runs: list[list[FrameLabel]]) -> list[tuple[str, int, int]]:
    return [(run[0].conditions[0][1], run[0].number, run[-1].number) for run in runs]


def test_a_run_ends_where_the_label_or_the_numbering_does() -> None:
    assert shown(label_runs(labels("aaabba"))) == [("a", 0, 2), ("b", 3, 4), ("a", 5, 5)]
    assert shown(label_runs(labels("aaaa", [4, 5, 9, 10]))) == [("a", 4, 5), ("a", 9, 10)]


def test_short_runs_take_the_label_before_them() -> None:
    assert shown(label_runs(labels("aaabaaa"), bridge_frames=2)) == [("a", 0, 6)]
    assert shown(label_runs(labels("aaabbaa"), bridge_frames=2)) == [("a", 0, 2), ("b", 3, 4), ("a", 5, 6)]
    # the first has none before it, and a gap is no flicker
    assert shown(label_runs(labels("baaa"), bridge_frames=2)) == [("b", 0, 0), ("a", 1, 3)]
    assert shown(label_runs(labels("aab", [0, 1, 5]), bridge_frames=2)) == [("a", 0, 1), ("b", 5, 5)]


@given(text=st.text("abc", max_size=40), bridge=st.integers(0, 4))
def test_every_frame_is_in_one_run(text: str, bridge: int) -> None:
    runs = label_runs(labels(text), bridge_frames=bridge)
    assert [label.number for run in runs for label in run] == list(range(len(text)))
    assert all(len({label.conditions for label in run}) == 1 for run in runs)
    neighbours = itertools.pairwise(runs)
    assert all(before[0].conditions != after[0].conditions for before, after in neighbours)


def test_runs_that_are_too_short_are_counted() -> None:
    segments, skipped = runs_to_segments("v", labels("aaaaabcc"), min_frames=3, bridge_frames=0)
    assert [(s.first, s.last, s.conditions) for s in segments] == [(0, 4, {"label": "a"})]
    assert len(skipped) == 1
    assert skipped[0].count == 2
    assert "2 runs of one label with 3 frames together are shorter than min_frames=3" in skipped[0].reason
