"""CPU seconds of a process and everything that it started, by what each of them is."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_seconds"]

_KINDS = (
    ("redis-server", "redis"),
    ("server.worker.encoder", "encoders"),
    ("spawn_main", "sampling process"),
    ("server.cli worker", "worker's parent"),
    ("server.cli reaper", "reaper"),
    ("server.cli api", "api"),
    ("server.cli serve", "supervisor"),
)
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(root: int) -> dict[str, float]:
    """Seconds of user and system time so far, summed over all processes of a kind; those that are gone are left out.

    Args:
        root: Process id of the embedded server.
    """
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # what follows the name in brackets, which may have any characters: state, parent, ...
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    sums: dict[str, float] = {}
    for process, seconds in used.items():
        if _is_below(process, root, parents):
            kind = _kind(process)
            sums[kind] = sums.get(kind, 0.0) + seconds
    return sums


def _is_below(process: int, root: int, parents: dict[int, int]) -> bool:
    while process > 1:
        if process == root:
            return True
        process = parents.get(process, 0)
    return False


def _kind(process: int) -> str:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "other"
    return next((kind for part, kind in _KINDS if part in command), "other")
