"""Milliseconds of the SSD operator's back ends by sequence length: where ``auto`` should change from one to the other.

python benchmarks/ssd.py

Shapes are those of the ``small`` denoiser (8 heads of 64, state 64); the batch shrinks as the length grows, so that
every row has the same number of tokens. Medians; forward, without gradients.
"""

import argparse
import statistics
import time

import torch

from medsora.ops import ssd

LENGTHS = (4, 32, 48, 64, 128, 256, 512, 1024)
HEADS, HEADDIM, STATE = 8, 64, 64


def milliseconds(backend: str, length: int, tokens: int, repeats: int) -> float:
    batch = max(1, tokens // length)
    operands = (
        torch.randn(batch, length, HEADS, HEADDIM),
        torch.rand(batch, length, HEADS) * 0.1,
        -torch.rand(HEADS) - 0.1,
        torch.randn(batch, length, 1, STATE),
        torch.randn(batch, length, 1, STATE),
    )
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            ssd(*operands, backend=backend)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {arguments.tokens} tokens\n\nlength   dual  chunked")
    for length in LENGTHS:
        dual, chunked = (
            milliseconds(backend, length, arguments.tokens, arguments.repeats) for backend in ("dual", "chunked")
        )
        print(f"{length:6d} {dual:6.1f} {chunked:8.1f}")


if __name__ == "__main__":
    main()
