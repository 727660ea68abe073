"""NeuralMemory against titans-pytorch's NeuralMemory: forward + backward of the layer, interleaved; decode; memory.

pip install titans-pytorch   # an optional peer; without it only memzoo is measured
python benchmarks/neural_memory.py --threads 2

Both layers have the same width, heads, network and activation and no convolution. "Op alone" is the memory without the
projections of queries, keys, values, gate and output; the peer's keeps its three small ones for step, momentum and
decay. Layers take turns of two steps, of which the second counts: the first finds memory and caches as another layer
left them. CPU milliseconds count all threads, also while they wait for work; GFLOP/s are the op's products per CPU
second; memory is the growth of the peak resident size over one step, each in a process of its own.
"""

import argparse
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from memzoo.kernels.neural_memory import neural_memory
from memzoo.kernels.neural_memory.arguments import SEGMENT, block_size
from memzoo.modeling.neural_memory import NeuralMemory


def memzoo_layer(args, depth, chunk):
    options = {"conv_kernel": None, "clip": None, "activation": "gelu"}
    layer = NeuralMemory(args.dim, args.heads, depth=depth, expansion=2.0, chunk_size=chunk, **options)
    layer.init_weights(0.02)
    return lambda x, state: layer(x, state or {})


def titans_memory(args, depth, chunk):
    from titans_pytorch import MemoryMLP
    from titans_pytorch import NeuralMemory as TitansMemory

    head = args.dim // args.heads
    network = MemoryMLP(head, depth=depth, expansion_factor=2.0)
    return TitansMemory(args.dim, chunk_size=chunk, dim_head=head, heads=args.heads, model=network)


def titans_layer(args, depth, chunk):
    layer = titans_memory(args, depth, chunk)
    return lambda x, state: layer(x, state=state)


def titans_op(args, depth, chunk):
    layer = titans_memory(args, depth, chunk)
    for name in ("to_queries", "to_keys", "to_values", "combine_heads", "retrieve_norm", "store_norm"):
        setattr(layer, name, torch.nn.Identity())
    layer.retrieve_gate = None
    return lambda x, state: layer(x, state=state)


def op(args, depth, chunk):
    """The op alone, on random tokens and gates, as a function of an unused x."""
    d, H = args.dim // args.heads, args.heads
    dims = [d, *[2 * d] * (depth - 1), d]
    W = [(torch.randn(H, b, a) * a**-0.5).requires_grad_() for a, b in pairwise(dims)]
    q, k, v = (F.normalize(torch.randn(args.batch, args.time, H, d), dim=-1).requires_grad_() for _ in range(3))
    gates = [(x * torch.rand(args.batch, args.time, H)).requires_grad_() for x in (0.01, 0.9, 0.01)]
    tokens = [x.transpose(1, 2) for x in (q, k, v, *gates)]
    return lambda x, _: neural_memory(
        *tokens, [w.expand(args.batch, *w.shape) for w in W], None, chunk, activation="gelu"
    )


LAYERS = {
    "memzoo": memzoo_layer,
    "memzoo, op alone": op,
    "titans-pytorch": titans_layer,
    "titans-pytorch, op alone": titans_op,
}


def train(layer, x):
    """Wall and CPU seconds of one forward + backward."""
    wall, cpu = time.perf_counter(), time.process_time()
    layer(x, None)[0].square().mean().backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def flops(args, depth, chunk):
    """GFLOP of the matrix products of the op's compiled form, forward + backward."""
    d, C = args.dim // args.heads, min(chunk, block_size(chunk))
    replayed = 1 - C / max(SEGMENT, chunk)
    dims = [d, *[2 * d] * (depth - 1), d]
    products = 0  # multiply-adds per token
    for layer, (a, b) in enumerate(pairwise(dims)):
        surprise = (1 + (layer > 0)) * a * b
        forward = surprise + 4 * a * b + C * (a + b)  # update and read W and S, attend to the chunk's steps
        backward = 2 * surprise + 8 * a * b + C * (3 * a + 2 * b) + 2 * replayed * a * b
        products += forward + backward
    return 2e-9 * args.batch * args.heads * args.time * products


def decode(layer, args):
    state, times = None, []
    with torch.no_grad():
        _, state = layer(torch.randn(args.batch, 8, args.dim), state)
        for _ in range(100):
            start = time.perf_counter()
            _, state = layer(torch.randn(args.batch, 1, args.dim), state)
            times.append(time.perf_counter() - start)
            yield times


def peak_growth(args, name):
    """MB, in this process (Linux; getrusage would report the parent's peak)."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    layer = LAYERS[name](args, args.depths[0], args.chunks[0])
    train(layer, torch.randn(1, args.chunks[0], args.dim))  # libraries are not the layer's memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak()
    train(layer, torch.randn(args.batch, args.time, args.dim))
    return (peak() - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 2, "time": 2048, "dim": 256, "heads": 4, "threads": 2, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--memory-of", choices=LAYERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_growth(args, args.memory_of))
        return
    names = [name for name in LAYERS if "memzoo" in name or importlib.util.find_spec("titans_pytorch")]
    x = torch.randn(args.batch, args.time, args.dim, requires_grad=True)
    print(f"torch {torch.__version__}, {args.threads} threads, float32, [{args.batch}, {args.time}, {args.dim}], "
          f"{args.heads} heads; medians of {args.rounds} interleaved rounds")  # fmt: skip
    print("| depth | chunk | layer | wall ms | best wall ms | CPU ms | GFLOP/s | extra MB |")
    print("|" + 8 * "---|")
    for depth in args.depths:
        for chunk in args.chunks:
            layers = {name: LAYERS[name](args, depth, chunk) for name in names}
            times = {name: [] for name in names}
            for round in range(args.rounds + 1):
                for name in names:
                    train(layers[name], x)
                    seconds = train(layers[name], x)
                    if round:  # the first warms up
                        times[name].append(seconds)
            for name in names:
                wall, cpu = (1e3 * statistics.median(column) for column in zip(*times[name]))
                best = 1e3 * min(times[name])[0]
                command = [sys.executable, *sys.argv, "--depths", str(depth), "--chunks", str(chunk)]
                memory = subprocess.run([*command, "--memory-of", name], check=True, capture_output=True, text=True)
                rate = f"{1e3 * flops(args, depth, chunk) / cpu:.0f}" if LAYERS[name] is op else ""
                print(f"| {depth} | {chunk} | {name} | {wall:.0f} | {best:.0f} | {cpu:.0f} | {rate} | "
                      f"{float(memory.stdout):.0f} |", flush=True)  # fmt: skip
            for peer in [name for name in names if "titans" in name]:
                name = peer.replace("titans-pytorch", "memzoo")
                pairs = list(zip(times[peer], times[name]))
                wall, cpu = (statistics.median(theirs[i] / ours[i] for theirs, ours in pairs) for i in (0, 1))
                print(f"| {depth} | {chunk} | {peer} / {name} | {wall:.1f} | | {cpu:.1f} | | |", flush=True)
    names = [name for name in names if "op alone" not in name]
    for depth in args.depths:
        for steps in zip(*(decode(LAYERS[name](args, depth, 16), args) for name in names)):  # noqa: B007, interleaved
            pass
        text = ", ".join(f"{name} {1e3 * statistics.median(times):.2f} ms" for name, times in zip(names, steps))
        print(f"decode, depth {depth}: {text} per token")


if __name__ == "__main__":
    main()
