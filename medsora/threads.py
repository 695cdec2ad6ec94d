"""How torch's CPU threads wait for each other. Torch-free, and to be called before torch is imported."""

import os

__all__ = ["let_idle_threads_sleep"]

SPINS = 1000


def let_idle_threads_sleep() -> None:
    """Make OpenMP threads of this process, and of its children, spin for a moment while they wait, then sleep.

    By default they spin for long. That is quicker by a few per cent on an idle machine, and ruinous as soon as
    anything else wants the cores: two samplers on two cores took 13 to 31 s each for what takes 2.7 s so
    (docs/experiments.md). Whoever has set ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` keeps that choice. OpenMP reads
    it once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
