"""Windows cover a clip without a gap, each on whole chunks that are known."""

import pytest

from medsora.windows import context_frames, plan_clip


@pytest.mark.parametrize("window", [16, 24, 32, 40])
@pytest.mark.parametrize("num_frames", [16, 24, 40, 64, 136])
@pytest.mark.parametrize("prefix_frames", [0, 1, 7, 8, 9, 15])
def test_windows_are_whole_chunks_of_one_length_without_a_gap(num_frames: int, prefix_frames: int, window: int) -> None:
    plan = plan_clip(num_frames, prefix_frames=prefix_frames, window=window)
    assert plan.known == plan.fill + prefix_frames
    assert 0 <= plan.fill < 8
    assert plan.total - plan.fill - plan.shown in range(8)
    done = plan.known
    for one in plan.windows:
        assert one.begin >= 0
        assert one.begin + one.known == done  # goes on where the last one ended
        assert (one.begin % 8, one.known % 8, one.end % 8) == (0, 0, 0)
        assert one.end - one.begin == min(window, plan.total)
        assert one.known >= min(done, context_frames(window))
        assert one.end > done
        done = one.end
    assert done == plan.total


def test_a_clip_that_fits_into_a_window_is_one() -> None:
    assert [(w.begin, w.known, w.end) for w in plan_clip(16, window=16).windows] == [(0, 0, 16)]
