"""Operators with several back ends of one signature each."""

from medsora.ops.ssd import BACKENDS, resolve_backend, ssd

__all__ = ["BACKENDS", "resolve_backend", "ssd"]
