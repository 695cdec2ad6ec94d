"""Operators with several back ends of one signature each."""

from medsora.ops.ssd import BACKENDS, at_least_float32, resolve_backend, ssd

__all__ = ["BACKENDS", "at_least_float32", "resolve_backend", "ssd"]
