"""What training costs on 1 to 512 GPUs: memory, communication and time of a step, by formulas (docs/scaling.md).

python benchmarks/scaling.py                                             the tables of docs/scaling.md
torchrun --standalone --nproc_per_node 2 benchmarks/scaling.py --measure   formulas against two processes, here
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

LLAMA_7B = 6.738e9  # parameters
SIZES = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}  # measured here
GPUS = (1, 2, 8, 16, 64, 128, 512)


@dataclass(frozen=True)
class Workload:
    """A model and what one GPU does with it in a step."""

    trained: float  # parameters with a gradient, kept in float32
    frozen: float = 0.0  # parameters without one, kept in bf16
    layers: int = 12
    hidden_size: int = 768
    vocab_size: int = 32000
    tokens: int = 8192  # of a GPU in a step
    checkpointing: bool = True
    mlp_ratio: float = 4.0  # intermediate_size / hidden_size
    read_layers: int = 0  # layers that read a bank
    extra_flops: float = 0.0  # of a GPU in a step beyond 2 per parameter and token in a forward, e.g. a bank's K and V
    extra_bytes: float = 0.0  # activations beyond those of a transformer, e.g. a bank's K and V
    idle: float = 0.0  # parameters that no matrix product with every token reads: embeddings, a bank's tokens
    whole: float = 0.0  # parameters that sharding gathers in one piece: a bank


@dataclass(frozen=True)
class Hardware:
    """Defaults: H100 SXM, 8 to a node; rates are of one GPU and one direction."""

    flops: float = 0.4 * 989e12  # 40 % of the bf16 peak, an assumption
    memory: float = 80e9  # bytes
    node_bandwidth: float = 300e9  # bytes/s within a node, of a ring
    network_bandwidth: float = 40e9  # bytes/s between nodes, 400 Gbit/s less overhead
    gpus_per_node: int = 8


def state_bytes(work: Workload, gpus: int, method: str) -> float:
    """Parameters, gradients and AdamW's two moments in float32, a frozen base in bf16.

    DDP keeps all of it on every GPU, and a copy of the gradients in its buckets. FSDP2 keeps a share, and the two
    layers that are computed and fetched in bf16; a bank is gathered whole in bf16, and so is its float32 gradient.
    "hsdp" shards within a node and replicates between nodes.
    """
    if method == "ddp":
        return (16 + (4 if gpus > 1 else 0)) * work.trained + 2 * work.frozen
    shards = min(gpus, 8) if method == "hsdp" else gpus
    layer = (work.trained + work.frozen - work.whole) / work.layers
    gathered = 2 * 2 * layer + (2 + 4) * work.whole if shards > 1 else 0
    return (16 * work.trained + 2 * work.frozen) / shards + gathered


def activation_bytes(work: Workload) -> float:
    """bf16: with checkpointing the input of every layer and one layer in full; logits in float32 with their gradient.

    A layer with SwiGLU keeps 29 + 8 r bytes a token and channel, r the ratio of its widths, and 24 more where it reads
    a bank as wide as itself: counted by `kept_bytes`.
    """
    token = work.tokens * work.hidden_size
    layer, read = (29 + 8 * work.mlp_ratio) * token, 24 * token
    kept = 2 * token * work.layers + layer + read * bool(work.read_layers)
    if not work.checkpointing:
        kept = layer * work.layers + read * work.read_layers
    return kept + 2 * 4 * work.tokens * work.vocab_size + work.extra_bytes


def communication_bytes(work: Workload, gpus: int, method: str) -> tuple[float, float]:
    """Sent by a GPU in a step, within its node or ring, and between nodes.

    DDP: a ring all-reduce of float32 gradients, 2 (N - 1) / N x 4 P. FSDP2: all-gather of bf16 parameters in the
    forward and in the backward, reduce-scatter of float32 gradients. "hsdp": that within the node, and an all-reduce
    of the shard's gradients between nodes.
    """
    share = (gpus - 1) / gpus
    if method == "ddp":
        return 2 * share * 4 * work.trained, 0.0
    everything, gradients = 2 * (work.trained + work.frozen), 4 * work.trained
    if method == "fsdp2":
        return share * (2 * everything + gradients), 0.0
    shards = min(gpus, 8)
    nodes = gpus // shards
    within = (shards - 1) / shards * (2 * everything + gradients)
    return within, 2 * (nodes - 1) / nodes * gradients / shards


def compute_seconds(work: Workload, hardware: Hardware) -> tuple[float, float]:
    """Forward and backward. A frozen parameter needs no gradient of its own: its backward costs a forward."""
    trained, frozen = 2 * work.tokens * (work.trained - work.idle), 2 * work.tokens * work.frozen
    forward = trained + frozen + work.extra_flops
    backward = 2 * (trained + work.extra_flops) + frozen + (forward if work.checkpointing else 0)
    return forward / hardware.flops, backward / hardware.flops


def step_seconds(work: Workload, gpus: int, method: str, hardware: Hardware) -> float:
    """DDP's all-reduce hides behind the backward, FSDP2's transfers behind the whole step; the longer one counts."""
    forward, backward = compute_seconds(work, hardware)
    within, between = communication_bytes(work, gpus, method)
    one_node = gpus <= hardware.gpus_per_node or method == "hsdp"
    bandwidth = hardware.node_bandwidth if one_node else hardware.network_bandwidth
    transfer = within / bandwidth + between / hardware.network_bandwidth
    return forward + max(backward, transfer) if method == "ddp" else max(forward + backward, transfer)


def table(work: Workload, hardware: Hardware, methods: tuple[str, ...]) -> str:
    """A row for each number of GPUs: what one holds and sends in a step, and the share of speed without waiting."""
    lines = ["| GPUs |" + "".join(f" {m}: GB held | GB sent | s/step | efficiency |" for m in methods)]
    lines.append("|---|" + "---|" * 4 * len(methods))
    ideal = sum(compute_seconds(work, hardware))
    for gpus in GPUS:
        row = f"| {gpus} |"
        for method in methods:
            held = state_bytes(work, gpus, method) + activation_bytes(work)
            seconds = step_seconds(work, gpus, method, hardware)
            sent = sum(communication_bytes(work, gpus, method)) / 1e9
            fits = "" if held < 0.92 * hardware.memory else " (too much)"
            row += f" {held / 1e9:.1f}{fits} | {sent:.1f} | {seconds:.2f} | {ideal / seconds:.0%} |"
        lines.append(row)
    return "\n".join(lines)


def base_workload() -> Workload:
    """training/configs/base_small.yaml: neither the embeddings nor the bank's 1,024 tokens are read by every token."""
    return Workload(trained=148e6, idle=32000 * 768 + 1024 * 768, read_layers=4)


def bank_workload(rank: int | None = None, memory_layers: int = 4, tokens: int = 16384) -> Workload:
    """A frozen 7B base (Llama 2: 32 layers of 4096) with one bank of 2^20 tokens in 1,024 chapters, 8 read by a token.

    With `rank`, the "reduced" bank of that width. The router's keys, K, V, Q and O of each memory layer are trained.
    Enough tokens choose every chapter, so K and V of the whole bank are computed in every step.
    """
    hidden, bank, chapters, read = 4096, 1 << 20, 1024, 8
    width = rank or hidden
    keys = width // 8  # of K and V each: eight heads share them
    projections = memory_layers * (2 * hidden * width + 2 * width * keys + chapters * hidden)
    keys_values = memory_layers * 2 * bank * width * keys * 2
    reads = memory_layers * tokens * read * (bank // chapters) * width * 4
    return Workload(
        trained=bank * width + projections,
        idle=bank * width + memory_layers * 2 * width * keys,
        whole=bank * width,
        frozen=LLAMA_7B,
        layers=32,
        mlp_ratio=11008 / 4096,
        read_layers=memory_layers,
        hidden_size=hidden,
        tokens=tokens,
        extra_flops=keys_values + reads,
        extra_bytes=2 * 2 * bank * keys,  # one layer's K and V: read again in the backward
    )


def print_tables() -> None:
    base = base_workload()
    print("base_small, 8 x 1,024 tokens a GPU\n\n" + table(base, Hardware(), ("ddp", "fsdp2")))
    for rank in (None, 512):
        work = bank_workload(rank)
        kind = "full width" if rank is None else f"reduced to {rank}"
        forward, backward = compute_seconds(work, Hardware())
        without = sum(compute_seconds(replace(work, extra_flops=0.0), Hardware()))
        share = 1 - without / (forward + backward)
        print(
            f"\n7B and a bank of 1 M tokens, {kind}: {work.trained / 1e9:.2f} G trained, {share:.0%} of the compute\n"
        )
        print(table(work, Hardware(), ("fsdp2", "hsdp")))


@contextmanager
def counted(module: Any, *names: str) -> Iterator[list[int]]:
    """Bytes of the whole message, which is in the larger of two tensors, of each call of collectives."""
    sizes: list[int] = []

    def counting(original):
        def call(*args, **kwargs):
            sizes.append(max(x.nbytes for x in [*args, *kwargs.values()] if hasattr(x, "nbytes")))
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(module, name, counting(getattr(module, name))))
        yield sizes


def kept_bytes(layers: int, **fields: Any) -> int:
    """What autograd keeps for the backward of a bf16 model of so many layers, parameters apart, for 512 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from memzoo import MemoryBankTransformerConfig

    config = MemoryBankTransformerConfig(**SIZES, num_hidden_layers=layers, **fields)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    ids = torch.randint(3, 512, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def measure() -> None:
    """Counts bytes and takes times in two processes, and prints them beside what the formulas say."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    from memzoo import MemoryBankTransformerConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    config = MemoryBankTransformerConfig(**SIZES, num_hidden_layers=4)
    ids = torch.randint(3, 512, (4, 128), generator=torch.Generator().manual_seed(dist.get_rank()))

    def fresh():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).train()

    def train(model, steps=6):
        optimizer, times = torch.optim.AdamW(model.parameters(), lr=1e-4), []
        for _ in range(steps):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            times.append(time.perf_counter() - start)
        return optimizer, min(times[1:])

    def held(model, optimizer):
        local = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
        grads = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in model.parameters()]
        moments = [m for s in optimizer.state.values() for m in s.values() if m.dim()]
        return sum(x.numel() * 4 for x in [*local, *grads]) + sum(
            getattr(m, "to_local", lambda m=m: m)().numel() * 4 for m in moments
        )

    plain = fresh()
    parameters = sum(p.numel() for p in plain.parameters())
    work = Workload(trained=parameters, layers=4, hidden_size=256, vocab_size=512, tokens=512)
    alone = held(plain, (result := train(plain))[0]), result[1]
    reduced = 0

    def count(state, bucket):
        nonlocal reduced
        reduced += bucket.buffer().numel() * 4
        return dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped = DistributedDataParallel(fresh())
    wrapped.register_comm_hook(None, count)
    ddp = held(wrapped, (result := train(wrapped))[0]), result[1]
    message, times = torch.zeros(parameters), []
    for _ in range(5):
        start = time.perf_counter()
        dist.all_reduce(message)
        times.append(time.perf_counter() - start)
    sharded = fresh()
    options: dict = {"mesh": init_device_mesh("cpu", (world,))}
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in sharded.model.layers:
        fully_shard(layer, **options)
    fully_shard(sharded, **options)
    with counted(dist, "all_gather_single", "reduce_scatter_single") as sent:
        fsdp = held(sharded, (result := train(sharded))[0]), result[1]
    if dist.get_rank() == 0:
        print(f"{parameters:,} parameters, {world} processes of one thread, 512 tokens each, float32, gloo")
        buckets = 4 * parameters
        for name, (size, seconds), formula in (
            ("one process", alone, state_bytes(work, 1, "ddp")),
            ("ddp, without its buckets", ddp, state_bytes(work, world, "ddp") - buckets),
            ("fsdp2", fsdp, 16 * parameters / world),
        ):
            print(f"{name}: {size / 1e6:.2f} MB held, formula {formula / 1e6:.2f}; {seconds:.3f} s a step")
        print(f"ddp reduces {reduced / 6 / 1e6:.2f} MB a step, formula {4 * parameters / 1e6:.2f}")
        formula = communication_bytes(work, world, "fsdp2")[0] / 1e6
        print(f"fsdp2 sends {sum(sent) * (world - 1) / world / 6 / 1e6:.2f} MB a step, formula {formula:.2f}")
        print(f"a bare all-reduce of as much takes {min(times):.3f} s")
        for name, fields in (("a layer", {"memory_placement": "none"}), ("one that reads the bank", {})):
            kept = (kept_bytes(3, **fields) - kept_bytes(2, **fields)) / 512 / SIZES["hidden_size"]
            formula = 29 + 8 * SIZES["intermediate_size"] / SIZES["hidden_size"] + (0 if fields else 24)
            print(f"{name} keeps {kept:.2f} bytes a token and channel in bf16, formula {formula:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="under torchrun")
    measure() if parser.parse_args().measure else print_tables()
