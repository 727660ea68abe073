"""memory_gru: the compiled loops against the plain torch loop, forward + backward, interleaved, and one decode step.

OMP_WAIT_POLICY=PASSIVE python benchmarks/memory_gru.py --shapes 2x128 2x2048
Memory is the growth of the peak resident size over one forward + backward, each in a process of its own.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from memzoo.kernels.memory_gru import MemoryGRUWeights, memory_gru

IMPLEMENTATIONS = ("fused", "reference")


def make(B, T, args, grad):
    def random(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).requires_grad_(grad)

    H, K, S, m, R = args.hidden, args.banks, args.slots, args.dim, args.router
    shapes = (R, H), (K, R), (K,), (m + 1, H), (3 * H, m), (3 * H, H), (3 * m + 2, H), (3 * m + 2,)
    weights = MemoryGRUWeights(*(random(*shape, scale=shape[-1] ** -0.5) for shape in shapes))
    inputs = [random(B, T, R), random(B, T, m + 1), random(B, T, 3 * H), random(B, H), random(B, K, S, m, scale=0.3)]
    return inputs, weights


def train(inputs, weights, implementation):
    """Seconds of the forward and of the backward."""
    start = time.perf_counter()
    h_seq, logits, (_, M) = memory_gru(*inputs, weights, implementation=implementation)
    middle = time.perf_counter()
    torch.autograd.grad(h_seq.square().mean() + logits.square().mean() + M.square().mean(), [*inputs, *weights])
    return middle - start, time.perf_counter() - middle


@torch.no_grad()
def decode(inputs, weights, implementation):
    start = time.perf_counter()
    memory_gru(*inputs, weights, implementation=implementation)
    return time.perf_counter() - start


def peak_growth(B, T, args, implementation):
    """MB, in this process (Linux; getrusage would report the parent's peak)."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    inputs, weights = make(B, T, args, grad=True)
    train(*make(1, 2, args, grad=True), implementation)  # libraries and compiled code are not the op's memory
    before = peak()
    train(inputs, weights, implementation)
    return (peak() - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2x128", "2x2048"], help="batch x time")
    for name, value in {"hidden": 256, "banks": 4, "slots": 128, "dim": 64, "router": 32, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.memory_of:
        print(peak_growth(*shapes[0], args, args.memory_of))
        return

    print(f"torch {torch.__version__}, {args.threads} threads, float32, H {args.hidden}, K {args.banks}, "
          f"S {args.slots}, m {args.dim}, R {args.router}; medians of {args.rounds} interleaved rounds")  # fmt: skip
    print(
        "| B x T | implementation | forward ms | backward ms | best sum ms | tokens/s | ratio | extra MB |\n"
        + "|"
        + 8 * "---|"
    )
    for B, T in shapes:
        inputs, weights = make(B, T, args, grad=True)
        times = {name: [] for name in IMPLEMENTATIONS}
        for name in IMPLEMENTATIONS:
            train(inputs, weights, name)
        for _ in range(args.rounds):
            for name in IMPLEMENTATIONS:
                times[name].append(train(inputs, weights, name))
        ratio = statistics.median(sum(b) / sum(a) for a, b in zip(times["fused"], times["reference"]))
        for name in IMPLEMENTATIONS:
            forward, backward = (1e3 * statistics.median(column) for column in zip(*times[name]))
            best = 1e3 * min(map(sum, times[name]))
            tokens = B * T / statistics.median(map(sum, times[name]))
            command = [sys.executable, *sys.argv, "--shapes", f"{B}x{T}", "--memory-of", name]
            memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            last = f"{ratio:.1f} | {memory:.0f}" if name == "fused" else f"1 | {memory:.0f}"
            print(f"| {B} x {T} | {name} | {forward:.1f} | {backward:.1f} | {best:.1f} | {tokens:,.0f} | {last} |")

    inputs, weights = make(1, 1, args, grad=False)
    steps = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(200):
        for name in IMPLEMENTATIONS:
            steps[name].append(1e6 * decode(inputs, weights, name))
    fused, reference = (statistics.median(steps[name]) for name in IMPLEMENTATIONS)
    print(f"decode, B 1: fused {fused:.0f} us, reference {reference:.0f} us per step")


if __name__ == "__main__":
    main()
