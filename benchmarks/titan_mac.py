"""TitanMAC: training speed of the arrangements beside the same model without its memory, and how cost grows with T.

    python benchmarks/titan_mac.py --threads 2                                  tokens per second in training
    OMP_WAIT_POLICY=PASSIVE python benchmarks/titan_mac.py --growth             forward + backward at T = 8192 and 2048

The models take turns, and each one's best round counts. CPU seconds count all threads and depend less on other jobs
than wall seconds do.
"""

import argparse
import time

import torch

from memzoo import TitanMacConfig, TitanMacForCausalLM

VARIANTS = {
    "mac": {"titans_variant": "mac"},
    "mac, 16 memory tokens": {"titans_variant": "mac", "memory_num_tokens": 16},
    "mag": {"titans_variant": "mag"},
    "mal": {"titans_variant": "mal"},
    "without memory": {"memory_enabled": False},
}


def build(fields: dict, args: argparse.Namespace, window: int) -> TitanMacForCausalLM:
    torch.manual_seed(0)
    config = TitanMacConfig(
        vocab_size=args.vocab,
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.dim // 64,
        intermediate_size=args.ffn or 4 * args.dim,
        sliding_window=window,
        memory_chunk_size=args.chunk,
        memory_depth=args.depth,
        memory_expansion=args.expansion,
        **fields,
    )
    return TitanMacForCausalLM(config)


def step(
    model: TitanMacForCausalLM, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype
) -> tuple[float, float]:
    """Wall and CPU seconds of forward + backward (+ update)."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(ids, labels=ids).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()
    return time.perf_counter() - wall, time.process_time() - cpu


def best(models: dict, ids: dict, args: argparse.Namespace, train: bool) -> dict:
    """{name: (wall, cpu)} of each model on its ids, the least of the rounds after the first."""
    dtype = getattr(torch, args.dtype)
    optimizers = {}
    for name, model in models.items():
        optimizers[name] = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if train else None
    times: dict = {name: [] for name in models}
    for _ in range(args.rounds + 1):
        for name, model in models.items():
            times[name].append(step(model, ids[name], optimizers[name], dtype))
    return {name: tuple(min(x) for x in zip(*rows[1:])) for name, rows in times.items()}


def speed(args: argparse.Namespace) -> None:
    ids = torch.randint(3, args.vocab, (args.batch, args.time))
    models = {name: build(fields, args, args.window) for name, fields in VARIANTS.items()}
    times = best(models, dict.fromkeys(models, ids), args, train=True)
    print("| model | tokens/s | tokens/s of CPU time | parameters |\n|---|---|---|---|")
    for name, (wall, cpu) in times.items():
        size = models[name].num_parameters() / 1e6
        print(f"| {name} | {ids.numel() / wall:,.0f} | {ids.numel() / cpu:,.0f} | {size:.1f} M |")


def growth(args: argparse.Namespace) -> None:
    print("| model | CPU s at T = 2048 | at T = 8192 | ratio |\n|---|---|---|---|")
    for name, fields in VARIANTS.items():
        model = build(fields, args, 256)
        ids = {T: torch.randint(3, args.vocab, (1, T)) for T in (2048, 8192)}
        times = best(dict.fromkeys(ids, model), ids, args, train=False)
        short, long = times[2048][1], times[8192][1]
        print(f"| {name} | {short:.2f} | {long:.2f} | {long / short:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true")
    for name, value in {"dim": 256, "layers": 4, "window": 128, "vocab": 5000, "batch": 1, "time": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ffn", type=int, help="width of the feed-forward layer; 4 dim when absent")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--expansion", type=float, default=2.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (growth if args.growth else speed)(args)


if __name__ == "__main__":
    main()
