"""Processes of this package that another one starts: the command, and the environment that gives them its settings."""

import os
import sys
from pathlib import Path

from server.settings import Settings, secret_files

__all__ = ["child_command", "child_environment"]


def child_command(module: str, *arguments: str) -> list[str]:
    """Of a module of this package.

    Args:
        module: Its dotted name.
        arguments: What it is given.
    """
    # -P keeps the current folder out of its path: it may hold another package called `server`.
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(settings: Settings) -> dict[str, str]:
    """Our environment, but for settings, which are these; the package is found where it was found here.

    Secrets that came from files are among them, so the names of those files are not.
    """
    files = secret_files()
    inherited = {name: value for name, value in os.environ.items() if name not in files}
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)
    return {**inherited, **settings.environment(), "PYTHONPATH": path}
