"""The slot memory on one CPU thread: against its plain loop, over lengths, with and without top-k, and in a model.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/slot_memory.py [--rounds 5]

CPU time of one thread, the best of the rounds, in which all contestants take turns: other work on the machine matters
little. Prints the Markdown tables of docs/kernels/slot_memory.md.
"""

import argparse
import time
from collections.abc import Callable

import torch

from memzoo import DualMemoryConfig, DualMemoryForCausalLM, MemoryCache
from memzoo.kernels.slot_memory import empty_slots, slot_memory

# tokens per CPU second of the controller that the family comes from (training, one thread, this Xeon, torch 2.13),
# measured in turns with ours in one process; it reads the prefix again for every token
ORIGINAL = {(8, 64): 536, (8, 128): 257, (16, 128): 394, (32, 128): 546, (32, 64): 1094}


def best(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each, after one call to warm up."""
    least = dict.fromkeys(contestants, float("inf"))
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if turn:
                least[name] = min(least[name], 1e3 * (time.process_time() - start))
    return least


def op(B: int, T: int, M: int, backward: bool = True, width: int = 128, **options) -> Callable[[], object]:
    q, k, v = (torch.randn(B, 1, T, width, requires_grad=backward) for _ in range(3))
    state = empty_slots(B, 1, M, width, width, torch.float32, "cpu")

    def run() -> None:
        with torch.set_grad_enabled(backward):
            (y, peak, _), _ = slot_memory(q, k, v, state, **options)
            if backward:
                torch.autograd.grad(y.sum() + peak.sum(), [q, k, v])

    return run


def training(B: int, T: int, preset: str = "mamba_dualmem", **fields) -> Callable[[], object]:
    """One optimizer step of the original's sizes: width 128, two layers, 64 slots."""
    torch.manual_seed(0)
    config = DualMemoryConfig.from_preset(
        preset, vocab_size=64, hidden_size=128, num_hidden_layers=2, dropout=0.0, **fields
    )
    model = DualMemoryForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    ids = torch.randint(3, 64, (B, T))

    def run() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decoding(tokens: int, **fields) -> Callable[[], object]:
    """`tokens` tokens of the same model, one by one, after a prefix that fills the slots."""
    config = DualMemoryConfig.from_preset(
        "mamba_dualmem", vocab_size=64, hidden_size=128, num_hidden_layers=2, **fields
    )
    model = DualMemoryForCausalLM(config).eval()
    cache = MemoryCache(config)
    with torch.no_grad():
        model(torch.randint(3, 64, (1, 2 * config.memory_num_slots)), past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        for _ in range(tokens):
            model(torch.tensor([[5]]), past_key_values=cache)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print("one tier, M = 64, width 128, forward + backward\n")
    print("| B x T | plain loop ms | chunked ms | ratio |\n|---|---|---|---|")
    for B, T in ((8, 64), (4, 128)):
        ms = best({name: op(B, T, 64, implementation=name) for name in ("reference", "chunked")}, rounds)
        ratio = ms["reference"] / ms["chunked"]
        print(f"| {B}x{T} | {ms['reference']:.0f} | {ms['chunked']:.2f} | {ratio:.0f}x |", flush=True)

    print("\ntraining at the original's size, width 128, 2 layers, 64 slots: tokens per CPU second\n")
    print("| B x T | original | mamba_dualmem | ratio |\n|---|---|---|---|")
    for (B, T), original in ORIGINAL.items():
        rate = B * T / best({"": training(B, T)}, 3 * rounds)[""] * 1e3
        print(f"| {B}x{T} | {original:,} | {rate:,.0f} | {rate / original:.0f}x |", flush=True)

    print("\nthe same over lengths and options\n")
    presets: dict[str, dict] = {
        "mamba": {"preset": "mamba"},
        "mamba_dualmem": {},
        "memory in both layers": {"memory_layers": [0, 1]},
        "sinkhorn": {"memory_assignment": "sinkhorn"},
        "top-k 8": {"memory_top_k": 8},
    }
    print("| B x T | " + " | ".join(presets) + " |\n|---" + "|---" * len(presets) + "|")
    for B, T in ((32, 64), (16, 128), (16, 256), (4, 1024), (1, 4096), (1, 8192)):
        ms = best({name: training(B, T, **fields) for name, fields in presets.items()}, rounds)
        print(f"| {B}x{T} | " + " | ".join(f"{B * T / x * 1e3:,.0f}" for x in ms.values()) + " |", flush=True)

    print("\none tier, 4096 tokens: top-k against all slots, milliseconds\n")
    print("| slots | top-k | prefill, all | prefill, top-k | ratio | training, all | training, top-k | ratio |")
    print("|---" * 8 + "|")
    for M, top_k in ((64, 8), (512, 8), (2048, 32)):
        runs = {}
        for backward in (False, True):
            runs[f"all {backward}"] = op(1, 4096, M, backward)
            runs[f"top {backward}"] = op(1, 4096, M, backward, top_k=top_k)
        cells = list(best(runs, rounds).values())
        line = "".join(f" {a:.0f} | {b:.0f} | {a / b:.2f}x |" for a, b in (cells[:2], cells[2:]))
        print(f"| {M} | {top_k} |{line}", flush=True)

    print("\ndecoding, ms per token\n")
    for name, fields in (("all slots", {}), ("top-k 8", {"memory_top_k": 8}), ("sinkhorn", presets["sinkhorn"])):
        print(f"- {name}: {best({name: decoding(64, **fields)}, rounds)[name] / 64:.2f}", flush=True)


if __name__ == "__main__":
    main()
