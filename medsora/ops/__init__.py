"""Operators with several back ends of one signature each."""

from medsora.ops.backends import OPERATORS, resolve_backend
from medsora.ops.mixer import MixerWeights, mix
from medsora.ops.selective_scan import selective_scan
from medsora.ops.ssd import BACKENDS, at_least_float32, ssd
from medsora.ops.walks import Walks

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "MixerWeights",
    "Walks",
    "at_least_float32",
    "mix",
    "resolve_backend",
    "selective_scan",
    "ssd",
]
