"""How torch's CPU threads wait for each other. Torch-free, and to be called before torch is imported."""

import os

__all__ = ["let_idle_threads_sleep"]


def let_idle_threads_sleep() -> None:
    """Make OpenMP threads of this process, and of its children, sleep while they wait, not spin.

    Spinning is quicker by a hair on an idle machine. As soon as anything else wants the cores it is ruinous: two
    samplers on two cores took 13.1 s for what takes 2.3 s each with sleeping threads (docs/experiments.md). Whoever
    has set ``OMP_WAIT_POLICY`` keeps that choice. OpenMP reads it once, when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
