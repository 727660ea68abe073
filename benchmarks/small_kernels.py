"""The compiled kernels around a memory, beside the same in torch operators: convolution, norm and windowed attention.

    python benchmarks/small_kernels.py --threads 2

They take turns, and the median round counts: microseconds of a forward and of a backward, in float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.rms_norm import rms_norm
from memzoo.kernels.selective_scan import causal_conv1d
from memzoo.kernels.selective_scan.conv import _shifted_products
from memzoo.kernels.window_attention import window_attention
from memzoo.kernels.window_attention.blocks import window_attention_blocks

Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def convolution(T: int, channels: int) -> Case:
    def torch_form(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(_shifted_products(x.mT, weight, None, x.new_zeros(1, channels, 3)))

    leaves = [torch.randn(1, T, channels), torch.randn(channels, 4)]
    return lambda x, weight: causal_conv1d(x.mT, weight)[0], torch_form, leaves


def norm(T: int, width: int) -> Case:
    leaves = [torch.randn(1, T, width), torch.ones(width)]
    return lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (width,), w, 1e-5), leaves


def attention(T: int, window: int, per: int) -> Case:
    sizes = [(T, 4, 64), *[(T * per, 4, 64)] * 2, *[(16, 4, 64)] * 2]
    leaves = [torch.randn(1, *size) for size in sizes]
    return (
        lambda q, k, v, *prefix: window_attention(q, k, v, window, prefix, None, per),
        lambda q, k, v, *prefix: window_attention_blocks(q, k, v, window, prefix, None, per, 0.0),
        leaves,
    )


CASES: dict[str, Callable[[], Case]] = {
    "convolution and silu, [1, 1024, 768], 4 taps": lambda: convolution(1024, 768),
    "convolution, T = 128": lambda: convolution(128, 768),
    "norm, [1, 1024, 256]": lambda: norm(1024, 256),
    "norm, T = 128": lambda: norm(128, 256),
    "attention, [1, 1024, 4, 64], window 128, 16 persistent": lambda: attention(1024, 128, 1),
    "attention, window 512": lambda: attention(1024, 512, 1),
    "attention, T = 128, two keys a token": lambda: attention(128, 128, 2),
}


def microseconds(form: Callable[..., Tensor], leaves: list[Tensor], calls: int) -> tuple[float, float]:
    """Of a forward and of a backward, averages over the calls."""
    forward = backward = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        y = form(*leaves)
        middle = time.perf_counter()
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        backward += time.perf_counter() - middle
        forward += middle - start
    return 1e6 * forward / calls, 1e6 * backward / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="in a round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, microseconds\n\n| | forward | torch | backward | torch |\n|---|---|---|---|---|")
    for name, make in CASES.items():
        *forms, leaves = make()
        leaves = [x.requires_grad_() for x in leaves]
        for form in forms:
            microseconds(form, leaves, 3)
        rounds = [[microseconds(form, leaves, args.calls) for form in forms] for _ in range(args.rounds)]
        (ours, ours_back), (torchs, torchs_back) = (
            [statistics.median(times) for times in zip(*of_form)] for of_form in zip(*rounds)
        )
        print(f"| {name} | {ours:.0f} | {torchs:.0f} | {ours_back:.0f} | {torchs_back:.0f} |")


if __name__ == "__main__":
    main()
