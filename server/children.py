"""Child processes that read what came from outside: they get little of our environment, memory and time."""

import os
import resource

__all__ = ["limit_self", "plain_environment"]

_NEEDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


def plain_environment(*more: str) -> dict[str, str]:
    """The variables that a Python needs to start, and those named: what reads foreign files need not know our secrets.

    Args:
        more: Names of further variables that are handed on where they are set.
    """
    return {name: os.environ[name] for name in (*_NEEDED, *more) if name in os.environ}


def limit_self(*, size_bytes: int, cpu_s: int) -> None:
    """Bound this process for the rest of its life: its address space, its processor time; and no core dumps.

    Args:
        cpu_s: Seconds after which the system ends it.
    """
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
