"""Time and extra memory of `selective_scan` on CPU beside its peers, and the distance to what the machine can do.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/selective_scan.py [--slow] [--shape 4,512,512,16 ...]

Peers (optional, skipped where not installed): transformers' Mamba in its default form (a loop under autograd, half
a minute a run: only with --slow, once), compiled with associative_scan, and through mambapy's pscan. All compute the
same function, with softplus, D and z, from the same inputs. Times are medians over rounds in which every contestant
runs once, so that other work on the machine meets all of them. Extra memory is the peak of the resident set during one
forward and backward over its size just before, in a fresh process (Linux), y and gradients included.
"""

import argparse
import cProfile
import ctypes
import functools
import gc
import importlib.util
import multiprocessing
import pstats
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memzoo.kernels.selective_scan import fused, selective_scan

OURS, DEFAULT = "memzoo", "transformers, default"
FLOPS_EXP = 21  # of fused_kernels.exp32, a multiply-add counted as two
FLOPS_STATE = 2 * (FLOPS_EXP + 6) + 14  # forward, recompute and reverse of one (row, step, channel, state)


def make_inputs(batch: int, steps: int, channels: int, states: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """u, delta, A, B, C, D, z, delta_bias and dL/dy, laid out as the models have them: [B, T, I] in memory."""
    torch.manual_seed(0)
    u, delta, z, grad = (torch.randn(batch, steps, channels).transpose(1, 2) for _ in range(4))
    B, C = torch.randn(batch, steps, 2 * states).transpose(1, 2).split(states, dim=1)
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    inputs = [u, delta, A, B, C, torch.ones(channels), z, torch.full((channels,), -3.0)]
    return [x.detach().requires_grad_() for x in inputs], grad


def contestants() -> dict[str, Callable]:
    """Name -> function of the inputs that returns y."""

    def ours(implementation):
        return lambda *inputs: selective_scan(*inputs, delta_softplus=True, implementation=implementation)[0]

    runs = {f"{OURS}, torch operators": ours("chunked")}
    if fused.is_available():
        runs[f"{OURS}, numba"] = ours("fused")
    if importlib.util.find_spec("transformers"):
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        scan = functools.partial(mamba_selective_scan, delta_softplus=True)
        compiled = torch.compile(functools.partial(scan, use_associative_scan=True), dynamic=False)
        runs["transformers, compiled associative_scan"] = compiled
        if importlib.util.find_spec("mambapy"):
            runs["mambapy pscan"] = functools.partial(scan, use_mambapy=True)
        runs[DEFAULT] = scan
    return runs


def forward(run: Callable, inputs: list[torch.Tensor]) -> None:
    with torch.no_grad():
        run(*inputs)


def forward_backward(run: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
    torch.autograd.grad(run(*inputs), inputs, grad)


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _extra_memory(queue, name: str, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    run = contestants()[name]
    warm_up = (1, 4, *shape[2:]) if name == DEFAULT else shape
    inputs, grad = make_inputs(*warm_up)
    forward_backward(run, inputs, grad)
    inputs, grad = make_inputs(*shape)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    forward_backward(run, inputs, grad)
    queue.put(_status("VmHWM") - before)


def extra_memory(name: str, shape: tuple[int, ...], threads: int) -> float:
    """MB, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_extra_memory, args=(queue, name, shape, threads))
    process.start()
    process.join()
    return queue.get() / 1e6


def machine() -> tuple[float, float, float]:
    """Measured peaks: bytes/s of a large copy, float32 exp/s of torch in cache, float32 FLOP/s of a matmul."""
    large, copy = torch.rand(1 << 26), torch.empty(1 << 26)
    small, out = -torch.rand(1 << 14), torch.empty(1 << 14)  # in cache, and below what torch splits over threads
    square, product = torch.rand(2048, 2048), torch.empty(2048, 2048)

    def best(function: Callable, repeats: int) -> float:
        function()
        return min(seconds(lambda: [function() for _ in range(repeats)]) / repeats for _ in range(30))

    return (
        2 * large.nbytes / best(lambda: copy.copy_(large), 1),
        torch.get_num_threads() * small.numel() / best(lambda: torch.exp(small, out=out), 100),
        2 * 2048**3 / best(lambda: torch.mm(square, square, out=product), 1),
    )


def limits(shape: tuple[int, ...], measured: float) -> None:
    batch, steps, channels, states = shape
    bandwidth, exps, flops = machine()
    sequence, work = 4 * batch * steps * channels, batch * steps * channels * states
    moved = (4 + 1 + 1 + 7) * sequence  # u, delta, z -> y, chunk states; those and dL/dy again -> three gradients
    print(f"\nLimits for forward + backward ({measured * 1e3:.1f} ms):\n")
    print("| resource | amount | machine | alone | share |\n| :-- | --: | --: | --: | --: |")
    for name, amount, rate, unit in (
        ("memory traffic", moved, bandwidth, "GB"),
        ("exp, at torch.exp's rate in cache", 2 * work, exps, "Gexp"),
        ("arithmetic, at a matmul's rate", FLOPS_STATE * work, flops, "GFLOP"),
    ):
        alone = amount / rate
        print(
            f"| {name} | {amount / 1e9:.3f} {unit} | {rate / 1e9:.1f} {unit}/s | {alone * 1e3:.1f} ms "
            f"| {alone / measured:.0%} |"
        )


def profile(shape: tuple[int, ...], repeats: int = 20) -> None:
    """CPU time of one thread in the Numba kernels and around them; insensitive to other work on the machine."""
    torch.set_num_threads(1)
    inputs, grad = make_inputs(*shape)
    run = contestants()[f"{OURS}, numba"]
    forward_backward(run, inputs, grad)
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    for _ in range(repeats):
        forward_backward(run, inputs, grad)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4,512,512,16", "1,2048,512,16"], help="B,T,I,N (several)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="only where the time goes, on one thread")
    parser.add_argument("--slow", action="store_true", help="also transformers' default path, once for each shape")
    arguments = parser.parse_args()
    if arguments.profile:
        profile(tuple(map(int, arguments.shape[0].split(","))))
        return
    torch.set_num_threads(arguments.threads)
    runs = {name: run for name, run in contestants().items() if arguments.slow or name != DEFAULT}
    best = next(name for name in reversed(runs) if name.startswith(OURS))
    for shape in (tuple(map(int, text.split(","))) for text in arguments.shape):
        inputs, grad = make_inputs(*shape)
        times = {name: ([], []) for name in runs}
        for turn in range(arguments.rounds + 1):
            for name, run in runs.items():
                if name == DEFAULT and turn != 1:
                    continue
                pair = seconds(forward, run, inputs), seconds(forward_backward, run, inputs, grad)
                if turn:  # the first round compiles
                    for kept, value in zip(times[name], pair):
                        kept.append(value)
        median = {name: [statistics.median(kept) for kept in pair] for name, pair in times.items()}
        memory = {name: extra_memory(name, shape, arguments.threads) for name in runs}
        batch, steps, channels, states = shape
        print(
            f"\nB={batch} T={steps} I={channels} N={states}, float32, {arguments.threads} threads. Ratios to {best}.\n"
        )
        print(
            "| | forward ms | ratio | forward + backward ms | ratio | extra MB | ratio |\n"
            + "| :-- "
            + "| --: " * 6
            + "|"
        )
        for name in runs:
            cells = []
            for value, base, form in (
                (median[name][0] * 1e3, median[best][0] * 1e3, ".1f"),
                (median[name][1] * 1e3, median[best][1] * 1e3, ".1f"),
                (memory[name], memory[best], ".0f"),
            ):
                cells += [f"{value:{form}}", f"{value / base:.1f}x"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        limits(shape, median[best][1])


if __name__ == "__main__":
    main()
