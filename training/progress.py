"""A bar for people who watch a run in a terminal: steps, loss, clips a second, time left."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

__all__ = ["StepBar"]


class StepBar:
    """A bar on the last line of a terminal; nothing where the output is no terminal.

    What is printed meanwhile appears above it.

    Args:
        total: Steps of the run.
        done: Steps that are behind it.
        console: Where it is drawn; default the standard output.
        is_wanted: False draws nothing, in all processes but the first.
    """

    def __init__(self, total: int, done: int, *, console: Console | None = None, is_wanted: bool = True) -> None:
        console = console or Console()
        self.is_shown = is_wanted and console.is_terminal
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self.is_shown,
        )
        self._task: TaskID = self._progress.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> "StepBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self._progress.update(self._task, completed=step)

    def tell(self, *, loss: float, clips_per_second: float, seconds_left: float) -> None:
        """The newest figures, which stay until there are newer ones."""
        self._progress.update(
            self._task,
            figures=f"loss {loss:.4f}  {clips_per_second:.0f} clips/s  {duration(seconds_left)} left",
        )


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` where there are no hours."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
