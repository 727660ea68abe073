"""What memory adapters cost on a frozen Llama, beside the base alone and PEFT's LoRA and prefix tuning.

    python benchmarks/adapters.py [train | decode | both] [--rounds N] [--threads N]

Each round times every model once, one after another; the table has the best time of each (CPU time with one thread)
and, for training, the part of it that is arithmetic: the FLOPs of its matrix products at the rate of one of them.
"""

import argparse
import time

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo import MemoryConfig

HIDDEN, LAYERS, FFN, VOCABULARY, TOKENS = 512, 8, 1408, 8192, 2048
MEMORY = {"num_memory_tokens": TOKENS, "num_heads": 8, "task_type": "CAUSAL_LM"}
CHAPTERS = {"num_chapters": 16, "top_k_chapters": 4}
METHODS = {
    "frozen base": None,
    "LoRA r=16 on q, v": LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    f"prefix tuning, {TOKENS} tokens": PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM"),
    "full bank": MemoryConfig(**MEMORY),
    "full bank, shared": MemoryConfig(**MEMORY, sharing="shared"),
    "full bank, reduced to 128": MemoryConfig(**MEMORY, bank_type="reduced", bank_rank=128),
    "16 chapters, top 4": MemoryConfig(**MEMORY, **CHAPTERS),
    "16 chapters, top 4, reduced to 128": MemoryConfig(**MEMORY, **CHAPTERS, bank_type="reduced", bank_rank=128),
}


def build(config) -> torch.nn.Module:
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    base = LlamaForCausalLM(llama).requires_grad_(False)
    return base if config is None else get_peft_model(base, config)


def train_step(model, ids):
    """Forward and backward, also through the frozen base: its input has a gradient."""
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def decoder(model, ids):
    """A function that decodes one token after the prompt, again and again."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    token = ids[:, :1]

    def step():
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache)
        cache.crop(-1)

    return step


def best_times(steps: dict, rounds: int, repeats: int) -> dict[str, float]:
    """Milliseconds: CPU time of one thread, which other work disturbs least, or the clock's of several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            for _ in range(repeats):
                step()
            best[name] = min(best[name], (clock() - start) / repeats * 1e3)
    return best


def routed(q, k, v, chapters, log_weights, size, shared, *args, out_shape=None, **kwargs) -> int:
    """Two products over the keys of its chapters, for each token."""
    return 4 * q[0] * q[1] * q[2] * (chapters[1] * size + shared)


def routed_backward(grad, q, k, v, chapters, log_weights, out, lse, size, shared, *args, out_shape=None, **kwargs):
    """Five: the logits again, and the gradients of values, probabilities, keys and queries."""
    return 10 * q[0] * q[1] * q[2] * (chapters[1] * size + shared)


def flops(step) -> int:
    aten, memzoo = torch.ops.aten, torch.ops.memzoo
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *args, **kwargs: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
        aten.addmm_: lambda to, a, b, **kwargs: 2 * a[0] * a[1] * b[1],
        memzoo.bank_attention: routed,
        memzoo.bank_attention_backward: routed_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


def rate(rounds: int) -> float:
    """FLOPs per millisecond of the base's own largest products."""
    x, w = torch.randn(512, HIDDEN), torch.randn(FFN, HIDDEN)
    best = best_times({"": lambda: x @ w.T}, 5 * rounds, 10)[""]
    return 2 * 512 * HIDDEN * FFN / best


def table(title: str, steps: dict, rounds: int, repeats: int, arithmetic: bool) -> None:
    times = best_times(steps, rounds, repeats)
    base, names = times["frozen base"], ["", "ms", "of the base"]
    if arithmetic:
        speed, names = rate(rounds), [*names, "GFLOP", "of these at the rate of a product, ms"]
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name, step in steps.items():
        cells = [name, f"{times[name]:.1f}", f"{times[name] / base:.2f}"]
        if arithmetic:
            work = flops(step)
            cells += [f"{work / 1e9:.2f}", f"{work / speed:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["train", "decode", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = torch.randint(0, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(0))
    models = {name: build(config) for name, config in METHODS.items()}
    if arguments.what in ("train", "both"):
        steps = {name: lambda model=model: train_step(model.train(), ids) for name, model in models.items()}
        table("Forward and backward, B=2, T=256", steps, arguments.rounds, 1, arithmetic=True)
    if arguments.what in ("decode", "both"):
        steps = {name: decoder(model.eval(), ids) for name, model in models.items() if "prefix" not in name}
        table("A token after 256, B=2", steps, 4 * arguments.rounds, 4, arithmetic=False)


if __name__ == "__main__":
    main()
