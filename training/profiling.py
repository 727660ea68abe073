"""What a model costs: speed and peak memory in Trainer's own log, a profile by module, parameters, FLOPs and state.

    add_meters(trainer)               tokens/s, examples/s, peak memory and a smoothed loss in every log entry
    print(profile_model(model, ids))  time, memory and FLOPs of a forward, module by module
    print(analyze(model))             parameters by part, FLOPs per token, bytes of state and how they grow

FLOPs are those that torch counts: matrix products, convolutions and attention, not scans and other pointwise loops.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel, Trainer, TrainerCallback

from memzoo.modeling.statistics import parameter_breakdown
from memzoo.training.callbacks import peak_memory_mb


class _LogExtras(TrainerCallback):
    """Adds to the entries of Trainer's log that hold a training loss."""

    def extras(self, args, state, loss: float, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            extras = self.extras(args, state, float(logs["loss"]), model)
            logs.update(extras)  # what reporters see
            state.log_history[-1].update(extras)  # what is saved: Trainer put a copy of `logs` there


class ThroughputCallback(_LogExtras):
    """examples_per_second, tokens_per_second and peak_memory_mb since the last entry, evaluation not counted.

    Tokens need `include_num_input_tokens_seen` of TrainingArguments.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin(state)

    def _begin(self, state) -> None:
        self.seconds, self.first_step, self.first_token = 0.0, state.global_step, state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started

    def extras(self, args, state, loss, model):
        seconds = max(self.seconds, 1e-9)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        extras = {"examples_per_second": (state.global_step - self.first_step) * batch / seconds}
        if (tokens := state.num_input_tokens_seen - self.first_token) > 0:
            extras["tokens_per_second"] = tokens / seconds
        extras["peak_memory_mb"] = peak_memory_mb(model.device)
        self._begin(state)
        return extras


class SmoothedLossCallback(_LogExtras):
    """smoothed_loss: exponential mean of the logged losses, without a bias towards zero at the start.

    Args:
        smoothing: what an entry keeps of the mean before it, in [0, 1).
    """

    def __init__(self, smoothing: float = 0.9) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must be in [0, 1)")
        self.smoothing = smoothing

    def on_train_begin(self, args, state, control, **kwargs):
        self.mean = self.weight = 0.0

    def extras(self, args, state, loss, model):
        self.mean = self.smoothing * self.mean + (1 - self.smoothing) * loss
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)
        return {"smoothed_loss": self.mean / self.weight}


def add_meters(trainer: Trainer, smoothing: float = 0.9) -> None:
    """Both callbacks, before those that report to TensorBoard and the like, which take the entry as it is by then."""
    trainer.callback_handler.callbacks[:0] = [ThroughputCallback(), SmoothedLossCallback(smoothing)]


@dataclass(frozen=True)
class ModuleCost:
    name: str
    calls: int
    milliseconds: float
    megabytes: float  # allocated and still held at the end of the module, mostly what backward needs
    megaflops: float


@dataclass(frozen=True)
class Profile:
    """One forward, in the order of the model's modules; a module's cost includes that of its parts."""

    modules: list[ModuleCost]

    def __str__(self) -> str:
        width = max(len(cost.name) for cost in self.modules)
        lines = [f"{'module':<{width}}  calls        ms        MB    MFLOP"]
        for cost in self.modules:
            lines.append(
                f"{cost.name:<{width}}  {cost.calls:>5} {cost.milliseconds:>9.2f} {cost.megabytes:>9.2f} "
                f"{cost.megaflops:>8.1f}"
            )
        return "\n".join(lines)


def profile_model(model: PreTrainedModel, input_ids: Tensor, depth: int = 4, repeats: int = 3) -> Profile:
    """Profiles forwards of `input_ids` [B, T] with gradients, after one to warm up; figures are of one forward.

    Args:
        depth: levels of modules shown, 0 being the whole model.
        repeats: forwards that the figures are the mean of.
    """
    root = type(model).__name__
    names = {
        f"{root}.{name}" if name else root: module
        for name, module in model.named_modules()
        if name.count(".") + bool(name) <= depth
    }
    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    model(input_ids)
    with _count_flops() as flops:
        model(input_ids)
    with _ranges(names), profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(repeats):
            model(input_ids)
    by_name = {event.key: event for event in profiler.key_averages() if event.key in names}
    counts = flops.get_flop_counts()
    costs = []
    for name in names:
        if (event := by_name.get(name)) is None:
            continue  # a container, or a part that was not called
        memory = event.device_memory_usage if on_gpu else event.cpu_memory_usage
        microseconds = event.device_time_total if on_gpu else event.cpu_time_total
        megaflops = sum(counts.get(name, {}).values()) / 1e6
        costs.append(
            ModuleCost(name, event.count // repeats, microseconds / 1e3 / repeats, memory / 1e6 / repeats, megaflops)
        )
    return Profile(costs)


def _count_flops() -> FlopCounterMode:
    """torch's counter, which knows the attention kernels of GPUs, with that of the CPU."""

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: attention})


@contextmanager
def _ranges(modules: dict[str, nn.Module]) -> Iterator[None]:
    """Forwards of these modules are named ranges of torch.profiler."""
    open_ranges: list[Any] = []
    handles = []

    def enter(name: str):
        def hook(module, args):
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(module, args, output):
        open_ranges.pop().__exit__(None, None, None)

    try:
        for name, module in modules.items():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Analysis:
    parameters: dict[str, int]  # by part
    flops_per_token: float  # of a forward at `length` tokens
    length: int
    state_bytes: int  # of one sequence after `length` tokens
    state_bytes_per_token: float  # growth from there to twice as many; 0 is constant

    def __str__(self) -> str:
        width = max(len(part) for part in self.parameters)
        lines = [f"{part:<{width}}  {count:>12,}" for part, count in self.parameters.items()]
        lines.append(f"{'all parameters':<{width}}  {sum(self.parameters.values()):>12,}")
        lines.append(f"FLOPs per token at {self.length} tokens: {self.flops_per_token:,.0f}")
        lines.append(
            f"state after {self.length} tokens: {self.state_bytes:,} bytes, growing by "
            f"{self.state_bytes_per_token:,.0f} per token"
        )
        return "\n".join(lines)


@torch.no_grad()
def analyze(model: PreTrainedModel, length: int = 256) -> Analysis:
    """Parameters, FLOPs of a forward and size of the state of one sequence of `length` tokens."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    with _count_flops() as flops:
        model(ids, use_cache=False)
    once, twice = state_bytes(model, length), state_bytes(model, 2 * length)
    model.train(was_training)
    per_token = flops.get_total_flops() / length
    return Analysis(parameter_breakdown(model), per_token, length, once, (twice - once) / length)


@torch.no_grad()
def state_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that the model keeps of one sequence after `length` tokens, whatever kind of cache it has."""
    output = model(torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=True)
    cache = output["past_key_values"] if "past_key_values" in output else output["cache_params"]
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
