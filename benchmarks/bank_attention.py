"""What reading a memory bank costs: chapters of a huge bank, and the layer against the arithmetic it does.

python benchmarks/bank_attention.py [routed] [layer] [decode] [--threads N]

routed: a bank of 131,072 tokens in 512 chapters of which each token reads 4, against a whole bank of 1,024 tokens:
    equally many tokens are read. K and V are given.
layer: forward + backward of `MemoryRead` over a bank of 2,048 tokens, and of a whole model with it on every layer,
    against the time that its matrix products would take at the rate of one large product, measured in the same run.
decode: one token at a time, with the bank's keys and values kept.
Each is the best of alternated rounds: CPU time of one thread, which other work on the machine disturbs least, or the
clock's of several. With NUMBA_DISABLE_JIT=1 the routed reads are those of torch operators.
"""

import argparse
import time
from collections.abc import Callable

import torch

from memzoo import MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM
from memzoo.kernels.bank_attention import bank_attention
from memzoo.modeling.memory_bank import MemoryBank, MemoryRead


def best_of(rounds: int, contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Best milliseconds of each, taking turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(contestants, float("inf"))
    for i in range(rounds + 1):  # the first round warms up
        for name, run in contestants.items():
            start = clock()
            run()
            if i:
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def routed_contestants(n: int, heads: int, kv_heads: int, width: int) -> dict[str, Callable[[], object]]:
    q = torch.randn(1, n, heads, width)
    k, v = torch.randn(kv_heads, 131_072, width), torch.randn(kv_heads, 131_072, width)
    small_k, small_v = k[:, :1024].contiguous(), v[:, :1024].contiguous()
    chosen = (torch.rand(n, 512).topk(4, -1).indices[None], torch.randn(1, n, 4).log_softmax(-1), 512)
    return {
        "whole": lambda: bank_attention(q, small_k, small_v),
        "joint": lambda: bank_attention(q, k, v, *chosen),
        "separate": lambda: bank_attention(q, k, v, *chosen, mixing="separate"),
    }


@torch.no_grad()
def routed(rounds: int, tokens: list[int]) -> None:
    """4 of 512 chapters against a bank as large as what is read."""
    print("| tokens | heads x width | key heads | whole 1,024 ms | 4 of 512 chapters ms | ratio joint | separate |")
    print("|---|---|---|---|---|---|---|")
    for n in tokens:
        for heads, kv_heads, width in ((8, 8, 64), (8, 2, 64), (8, 1, 64), (4, 1, 128)):
            whole, joint, separate = best_of(rounds, routed_contestants(n, heads, kv_heads, width)).values()
            ratios = f"{joint / whole:.2f} | {separate / whole:.2f}"
            print(f"| {n} | {heads} x {width} | {kv_heads} | {whole:.0f} | {joint:.0f} | {ratios} |", flush=True)


def products(B: int, T: int, hidden: int, width: int, kv_width: int, read: int, bank: int) -> float:
    """GFLOP of a forward and backward: every product once forward and twice backward, nothing recomputed."""
    rows = B * T
    projections = 2 * rows * hidden * width + 2 * bank * width * kv_width  # q and o, k and v
    return 3 * 2 * (projections + 2 * rows * read * width) / 1e9


def layer(rounds: int) -> None:
    """The layer's forward + backward against its arithmetic."""
    B, T, hidden, tokens = 2, 1024, 512, 2048
    square = torch.randn(2048, 2048)
    x = torch.randn(B, T, hidden, requires_grad=True)
    contestants: dict[str, Callable[[], object]] = {"product": lambda: square @ square}
    flops = {}
    for heads, kv_heads, chapters, top_k in ((8, 8, 1, 1), (8, 2, 1, 1), (4, 4, 1, 1), (4, 2, 1, 1), (4, 2, 16, 4)):
        bank = MemoryBank(tokens, hidden, num_chapters=chapters)
        read = MemoryRead(hidden, hidden, heads, kv_heads, chapters, top_k_chapters=top_k, zero_init=False)
        read.init_weights(0.05)
        name = f"{heads} heads, {kv_heads} key heads, " + (
            f"{top_k} of {chapters} chapters" if chapters > 1 else "whole"
        )
        contestants[name] = lambda read=read, bank=bank: read(x, bank, {})[0].sum().backward()
        share = tokens // chapters * top_k if chapters > 1 else tokens
        flops[name] = products(B, T, hidden, hidden, kv_heads * hidden // heads, share, tokens)
    config = MemoryBankTransformerConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1408,
        memory_num_tokens=tokens,
        memory_num_heads=4,
        memory_num_key_value_heads=2,
        memory_zero_init=False,
    )
    model, ids = MemoryBankTransformerForCausalLM(config).train(), torch.randint(3, 8192, (B, T))
    contestants["the whole model, 8 layers"] = lambda: model(ids, labels=ids, use_cache=False).loss.backward()
    dense = B * T * (8 * (4 * hidden**2 + 3 * hidden * 1408) + 8192 * hidden) + 8 * B * T * T * hidden  # causal
    flops["the whole model, 8 layers"] = 6 * dense / 1e9 + 8 * products(
        B, T, hidden, hidden, hidden // 2, tokens, tokens
    )
    best = best_of(rounds, contestants)
    rate = 2 * 2048**3 / 1e9 / best["product"]  # GFLOP per millisecond
    print(f"one product of 2048 x 2048: {1e3 * rate:.0f} GFLOP/s; x [{B}, {T}, {hidden}], bank {tokens}")
    print("| | GFLOP | arithmetic ms | ms | ratio |\n|---|---|---|---|---|")
    for name, count in flops.items():
        print(f"| {name} | {count:.1f} | {count / rate:.0f} | {best[name]:.0f} | {best[name] * rate / count:.2f} |")


@torch.no_grad()
def decode(rounds: int) -> None:
    """One token through the layer."""
    x, contestants = torch.randn(1, 1, 512), {}
    for name, chapters, quantization in (
        ("2,048 tokens, whole", 1, None),
        ("2,048 tokens, 4 of 16 chapters", 16, None),
        ("2,048 tokens in int8, whole", 1, "int8"),
        ("2,048 tokens in int8, 4 of 16 chapters", 16, "int8"),
        ("2,048 tokens in int4, 4 of 16 chapters", 16, "int4"),
    ):
        bank = MemoryBank(2048, 512, num_chapters=chapters, quantization=quantization)
        read = MemoryRead(512, 512, 8, 2, chapters, top_k_chapters=min(4, chapters)).eval()
        contestants[name] = lambda read=read, bank=bank: read(x, bank, {})
    for name, ms in best_of(rounds, contestants).items():
        print(f"{name}: {ms:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["routed", "layer", "decode"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for part in arguments.parts:
        if part == "routed":
            routed(arguments.rounds, arguments.tokens)
        elif part == "layer":
            layer(arguments.rounds)
        elif part == "decode":
            decode(50 * arguments.rounds)
        else:
            parser.error(f"there is no part {part!r}: routed, layer, decode")


if __name__ == "__main__":
    main()
