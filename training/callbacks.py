"""What a run shows: a progress bar with readable lines; sample text and memory statistics at every evaluation."""

import resource
import sys
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerCallback

from memzoo.training.config import SampleConfig
from memzoo.training.sharding import is_sharded, takes_part


class ProgressLines(ProgressCallback):
    """Trainer's progress bar, with one short line per log: loss, bits per byte or accuracy, tokens per second."""

    def __init__(self, train_bits_per_nat: float | None):
        super().__init__()
        self.train_bits_per_nat = train_bits_per_nat

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        parts = []
        if "loss" in logs:
            loss = float(logs["loss"])
            parts = [f"loss {loss:.3f}"]
            parts += [f"{loss * self.train_bits_per_nat:.3f} bits per byte"] if self.train_bits_per_nat else []
            parts += [f"{logs['train_tokens_per_second']:,.0f} tokens/s"] if "train_tokens_per_second" in logs else []
            parts += [f"lr {logs['learning_rate']:.1e}"] if "learning_rate" in logs else []
        elif "eval_bits_per_byte" in logs:
            parts = [f"held out: {logs['eval_bits_per_byte']:.3f} bits per byte", f"{logs['eval_runtime']:.1f} s"]
        elif "eval_perplexity" in logs:
            parts = [f"held out: perplexity {logs['eval_perplexity']:.3f}", f"{logs['eval_runtime']:.1f} s"]
        elif "eval_exact" in logs:
            parts = [f"held out: {logs['eval_exact']:.1%} answered right, {logs['eval_accuracy']:.1%} of the tokens"]
        if parts:
            self.training_bar.write(f"step {state.global_step:>6}  " + "  ".join(parts))


class SampleText(TrainerCallback):
    """Generates from a few prompts at every evaluation, with time per token and peak memory.

    Its random numbers are its own: training goes on as if nothing had been sampled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, sample: SampleConfig, write=print):
        self.tokenizer, self.sample, self.write = tokenizer, sample, write

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        for prompt in self.sample.prompts if takes_part(model, state) else []:
            start = time.perf_counter()
            text, num_tokens = sample_text(model, self.tokenizer, prompt, self.sample, seed=state.global_step)
            seconds = time.perf_counter() - start
            if not state.is_world_process_zero:
                continue
            self.write(
                f"sample at step {state.global_step} ({1000 * seconds / num_tokens:.1f} ms per token, "
                f"{num_tokens / seconds:.0f} tokens/s, peak {peak_memory_mb(model.device):.0f} MB):\n{text}"
            )


class MemoryStatistics(TrainerCallback):
    """Logs what the memory does with the first held-out sequence at every evaluation: `memory/LAYER/NAME`.

    A model that has a memory says so itself: `get_memory_stats(input_ids)` returns a dict of numbers for each layer.
    Not under FSDP: it looks into layers outside of their forward, so each process would have to hold all of them.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero or is_sharded(model) or not hasattr(model, "get_memory_stats"):
            return
        ids = self.trainer.eval_dataset[0]["input_ids"][None].to(model.device)
        pad = model.config.pad_token_id
        mask = None if pad is None else ids != pad  # a task's rows are padded at their end
        was_training = model.training
        layers = model.eval().get_memory_stats(ids, mask)
        model.train(was_training)
        stats = {f"memory/{i}/{name}": float(value) for i, layer in enumerate(layers) for name, value in layer.items()}
        if stats:
            self.trainer.log(stats)


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sample: SampleConfig, seed: int
) -> tuple[str, int]:
    """Prompt and continuation, and the number of new tokens; the global random state is left as it was."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
    if tokenizer.bos_token_id is not None:
        ids = torch.cat([ids.new_full((1, 1), tokenizer.bos_token_id), ids], dim=1)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(model.device),
            max_new_tokens=sample.max_new_tokens,
            do_sample=sample.temperature > 0,
            temperature=sample.temperature or None,
            use_cache=True,
            synced_gpus=is_sharded(model),
        )
    model.train(was_training)
    text = str(tokenizer.decode(out[0], skip_special_tokens=True))
    return text, out.shape[1] - ids.shape[1]


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: of the GPU if the model is there, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes on macOS, kB elsewhere
