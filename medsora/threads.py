"""How threads of a process wait for each other: OpenMP's, which torch computes with, and Python's. Torch-free."""

import os
import sys

__all__ = ["let_idle_threads_sleep", "take_short_turns"]

SPINS = 1000
TURN_S = 0.0005


def let_idle_threads_sleep() -> None:
    """Make OpenMP threads of this process, and of its children, spin for a moment while they wait, then sleep.

    By default they spin for long. That is quicker by a few per cent on an idle machine, and ruinous as soon as
    anything else wants the cores: two samplers on two cores took 13 to 31 s each for what takes 2.7 s so
    (docs/experiments.md). Whoever has set ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` keeps that choice. OpenMP reads
    it once, when torch is imported, so this is to be called before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def take_short_turns() -> None:
    """Let threads of this process that want Python's interpreter wait for half a millisecond at most, not for five.

    For processes with threads that call out of Python thousands of times a second, to a GPU or a codec: each such call
    lets another thread have the interpreter, and one that computes in Python keeps it for a whole turn. Between two
    steps of a denoiser, of 7 ms each, there are about ten of them (docs/experiments.md, "what the sampler waits for").
    """
    sys.setswitchinterval(TURN_S)
