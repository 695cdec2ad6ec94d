"""Operators with several back ends of one signature each."""

from medsora.ops.backends import OPERATORS, resolve_backend
from medsora.ops.selective_scan import selective_scan
from medsora.ops.ssd import BACKENDS, at_least_float32, ssd

__all__ = ["BACKENDS", "OPERATORS", "at_least_float32", "resolve_backend", "selective_scan", "ssd"]
