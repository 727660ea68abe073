"""Gated slots: the compiled loops and the matrix form against the plain loop, forward + backward, in one run.

python benchmarks/gated_slots.py
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time

import torch

from memzoo.kernels.gated_slots import gated_slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2x128", "2x2048"], help="batch x length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    K, S, m = 4, 128, 64
    print(f"{K} banks x {S} slots x {m}, float32, {args.threads} threads, medians of {args.rounds}\n")
    print("| B x T | form | forward ms | backward ms | of the plain loop |\n|---|---|---|---|---|")
    for shape in args.shapes:
        B, T = map(int, shape.split("x"))
        shapes = [(B, T, 2, K, S), (B, T, K), (B, T), (B, T), (B, T, m), (B, K, S, m)]
        inputs = [torch.rand(*s).requires_grad_() for s in shapes]
        seconds: dict[str, list[tuple[float, float]]] = {"reference": [], "chunked": [], "fused": []}
        for i in range(args.rounds + 1):
            for form, times in seconds.items():
                start = time.perf_counter()
                y, _ = gated_slots(*inputs, implementation=form)  # type: ignore[arg-type]
                middle = time.perf_counter()
                torch.autograd.grad(y.sum(), inputs)
                if i:
                    times.append((middle - start, time.perf_counter() - middle))
        plain = statistics.median(map(sum, seconds["reference"]))
        for form, times in seconds.items():
            forward, backward = (1e3 * statistics.median(column) for column in zip(*times))
            ratio = plain / statistics.median(map(sum, times))
            print(f"| {shape} | {form} | {forward:.1f} | {backward:.1f} | {ratio:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
