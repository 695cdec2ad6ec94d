"""The bar shows where a run is, and is not there where nobody looks."""

import io

import pytest
from rich.console import Console

from training.progress import StepBar, duration


def test_the_bar_shows_steps_loss_speed_and_time_left() -> None:
    screen = io.StringIO()
    with StepBar(200, 40, console=Console(file=screen, force_terminal=True, width=120)) as bar:
        assert bar.is_shown
        bar.advance(50)
        bar.tell(loss=0.12345, clips_per_second=321.4, seconds_left=3725)
    shown = screen.getvalue()
    assert " 50/200" in shown
    assert "loss 0.1235" in shown or "loss 0.1234" in shown
    assert "321 clips/s" in shown
    assert "1:02:05 left" in shown


@pytest.mark.parametrize(("is_terminal", "is_wanted"), [(False, True), (True, False)])
def test_no_bar_without_a_terminal_or_in_other_processes(is_terminal: bool, is_wanted: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=120)
    with StepBar(200, 0, console=console, is_wanted=is_wanted) as bar:
        assert not bar.is_shown
        bar.advance(50)
        bar.tell(loss=0.1, clips_per_second=1.0, seconds_left=1.0)
    assert screen.getvalue().strip() == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (-3, 0.4, 59.6, 61, 3600)] == ["0:00", "0:00", "1:00", "1:01", "1:00:00"]
