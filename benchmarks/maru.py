"""MARU's speed, in ratios from one run: training against plain loops, decoding against transformers' Mamba.

    python benchmarks/maru.py train     # forward + backward, tokens per second
    python benchmarks/maru.py decode    # time per token at context 64 and 32 k

"plain loops" is the same model on the kernels' reference forms: one step of time after another, under autograd. The
public code that MARU comes from does the same and made 349 tokens/s on such a machine (B=2, T=128, hidden 256,
4 banks x 128 slots x 64, one layer). With one thread (`--threads 1`) times are CPU seconds, the best of all turns,
which other work on the machine disturbs least.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MambaConfig, MambaForCausalLM

from memzoo import MaruConfig, MaruForCausalLM, MemoryCache
from memzoo.modeling import memory_gru, state_space

SEED_TOKENS_PER_SECOND = 349


def interleave(tasks: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each task; the tasks take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    alone = torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for i in range(repeats + 1):
        for name, task in tasks.items():
            start = clock()
            task()
            if i:
                seconds[name].append(clock() - start)
    return {name: (min if alone else statistics.median)(values) for name, values in seconds.items()}


def training_step(model: MaruForCausalLM, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def plain(step: Callable[[], None]) -> Callable[[], None]:
    """The same step on the reference kernels."""

    def run() -> None:
        fast = state_space.selective_scan, memory_gru.memory_gru
        state_space.selective_scan = functools.partial(fast[0], implementation="reference")
        memory_gru.memory_gru = functools.partial(fast[1], implementation="reference")
        try:
            step()
        finally:
            state_space.selective_scan, memory_gru.memory_gru = fast

    return run


def train(args: argparse.Namespace) -> None:
    config = {"num_hidden_layers": 1, "dropout": 0.0}
    models = {kind: MaruForCausalLM(MaruConfig(recurrence=kind, **config)) for kind in ("sequential", "parallel")}
    for B, T in ((2, 128), (2, 2048)):
        ids = torch.randint(3, 264, (B, T))
        tasks = {kind: functools.partial(training_step, model, ids) for kind, model in models.items()}
        plain_loops = {"plain loops, sequential": plain(tasks["sequential"])}
        medians = interleave(tasks, args.repeats)
        medians |= interleave(plain_loops, args.repeats if T <= 128 else 1)
        print(f"\nforward + backward, B={B}, T={T}, hidden 256, 4 banks x 128 slots x 64, {args.threads} threads")
        print("| cell | ms | tokens/s | of the original's 349 | of sequential |\n|---|---|---|---|---|")
        for name, s in medians.items():
            rate = B * T / s
            ratio = f"{rate / SEED_TOKENS_PER_SECOND:.1f}x" if T == 128 else ""
            print(f"| {name} | {1e3 * s:.1f} | {rate:,.0f} | {ratio} | {medians['sequential'] / s:.2f}x |")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    tasks = {}
    for layers in (4,):
        for kind in ("parallel", "sequential"):
            model = MaruForCausalLM(MaruConfig(num_hidden_layers=layers, recurrence=kind)).eval()
            for context in (64, 32_768):
                cache = MemoryCache(model.config)
                for piece in torch.randint(3, 264, (1, context)).split(4096, 1):
                    model(piece, past_key_values=cache)
                tasks[f"MARU {kind}, context {context:,}"] = functools.partial(decode_steps, model, cache, args.tokens)
        mamba = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=256, num_hidden_layers=layers)).eval()
        out = mamba(torch.randint(3, 264, (1, 64)), use_cache=True)
        tasks["transformers Mamba, context 64"] = functools.partial(mamba_steps, mamba, out.cache_params, args.tokens)
    medians = interleave(tasks, args.repeats)
    last = medians["transformers Mamba, context 64"]
    print(f"\ndecode, 4 layers, hidden 256, batch 1, {args.threads} threads")
    print("| model | ms per token | of Mamba |\n|---|---|---|")
    for name, s in medians.items():
        print(f"| {name} | {1e3 * s / args.tokens:.2f} | {s / last:.2f}x |")
    for kind in ("parallel", "sequential"):
        ratio = medians[f"MARU {kind}, context 32,768"] / medians[f"MARU {kind}, context 64"]
        print(f"{kind}: a token at context 32 k takes {ratio:.3f}x a token at context 64")


def decode_steps(model: MaruForCausalLM, cache: MemoryCache, tokens: int) -> None:
    token = torch.tensor([[5]])
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)


def mamba_steps(model: MambaForCausalLM, cache: object, tokens: int) -> None:
    token = torch.tensor([[5]])
    for _ in range(tokens):
        token = model(token, cache_params=cache, use_cache=True).logits[:, -1:].argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=50, help="decoded per turn")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    {"train": train, "decode": decode}[args.what](args)


if __name__ == "__main__":
    main()
