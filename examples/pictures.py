"""The demo's pictures: what a token costs at every context length, and where a text is written in the memory."""

import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo import MemoryCache


def decode_times(model, cache, contexts, num_steps=24):
    """(milliseconds per token, bytes of cache) at every context length; the text is read in chunks of 1,024."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, contexts[-1] + num_steps * len(contexts)), generator=random)
    points = []
    with torch.no_grad():
        for context in contexts:
            for chunk in ids[:, cache.get_seq_length() : context].split(1024, dim=1):
                model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            size, seconds = cache_bytes(cache), []
            for _ in range(num_steps):
                start = time.perf_counter()
                model(ids[:, :1], past_key_values=cache, use_cache=True)
                seconds.append(time.perf_counter() - start)
            points.append((1000 * statistics.median(seconds), size))
    return points


def cache_bytes(cache) -> int:
    if isinstance(cache, MemoryCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def same_size_llama(model, context: int):
    """A Llama of the same width and depth, its MLP as wide as it takes to have as many parameters."""
    config = model.config
    D, L = config.hidden_size, config.num_hidden_layers
    rest = model.num_parameters() - 2 * config.vocab_size * D - 4 * L * D * D
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=max(D // 32, 1),
        intermediate_size=max(rest // (3 * L * D), D),
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(llama).eval()


def draw_latency(model, contexts: tuple[int, ...], path: Path) -> None:
    torch.set_num_threads(1)
    llama = same_size_llama(model, 2 * contexts[-1])
    curves = {
        f"MARU, {model.num_parameters() / 1e6:.2f} M parameters": decode_times(
            model, MemoryCache(model.config), contexts
        ),
        f"Llama, {llama.num_parameters() / 1e6:.2f} M parameters": decode_times(
            llama, DynamicCache(config=llama.config), contexts
        ),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, points), marker in zip(curves.items(), "os"):
        for axis, values in zip(axes, zip(*points)):
            axis.plot(contexts, values, marker + "-", label=name)
            axis.annotate(
                shown(values[-1], axis is axes[1]),
                (contexts[-1], values[-1]),
                xytext=(-4, 7),
                textcoords="offset points",
                ha="right",
                fontsize=9,
            )
        times, sizes = zip(*points)
        print(
            f"{name}: at context {contexts[0]} {shown(times[0], False)} a token, cache {shown(sizes[0], True)};",
            end=" ",
        )
        print(f"at {contexts[-1]:,} {shown(times[-1], False)} a token, cache {shown(sizes[-1], True)}")
    axes[0].set(ylabel="milliseconds per token", title="time to write one more token")
    axes[1].set(ylabel="bytes", title="what is kept of the text", yscale="log")
    for axis in axes:
        axis.set(xlabel="context (bytes read so far)", xscale="log")
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
        axis.margins(y=0.25)
    axes[0].set_ylim(0, 1.25 * max(time for points in curves.values() for time, _ in points))
    figure.suptitle("decoding on one CPU thread, fp32")
    figure.savefig(path, dpi=130)


def shown(value: float, is_bytes: bool) -> str:
    if not is_bytes:
        return f"{value:.2f} ms"
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def draw_memory(model, tokenizer, text: bytes, name: str, path: Path) -> None:
    """Above: every slot over a whole passage. Below: the busiest slots over one line of it, letter by letter."""
    first, width, busiest = 600, 80, 8
    writes = (
        model.memory_trace(torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_bytes(text)]]))[-1][0, 1:]
        .float()
        .numpy()
    )  # [T, K, S]
    _, K, S = writes.shape
    colours = plt.get_cmap("tab10")(range(K))[:, :3]

    def painted(w):  # [T, K, n] -> [K n, T, 3]: white where nothing is written, the bank's colour where most is
        strength = np.clip(w / np.quantile(writes, 0.999), 0, 1) ** 0.5
        image = 1 - strength[..., None] * (1 - colours[None, :, None])
        return image.transpose(1, 2, 0, 3).reshape(-1, len(w), 3)

    figure, (above, below) = plt.subplots(2, 1, figsize=(13, 9), height_ratios=(1, 1.15), layout="constrained")
    above.imshow(painted(writes), aspect="auto", interpolation="nearest")
    above.set(
        title=f"which slots the last layer writes while it reads {name} (stronger colour: more is written)",
        xlabel="position in the text (bytes)",
        ylabel=f"{S} slots in each of {K} banks",
    )
    above.set_yticks([S * k + S / 2 for k in range(K)], [f"bank {k}" for k in range(K)])
    above.axvspan(first, first + width, fill=False, ls="--", ec="black")

    part = writes[first : first + width]
    top = np.sort(np.argsort(-part.sum(0), axis=-1)[:, :busiest], axis=-1)  # [K, n]
    below.imshow(painted(np.take_along_axis(part, top[None], axis=2)), aspect="auto", interpolation="nearest")
    below.set_xticks(
        range(width), [chr(b) if 32 < b < 127 else "·" for b in text[first : first + width]], family="monospace"
    )
    below.set_yticks(range(K * busiest), [f"{slot}" for slot in top.flatten()], fontsize=7)
    below.set(title=f"the dashed part, letter by letter: the {busiest} busiest slots of each bank", ylabel="slot")
    for axis, rows in ((above, S), (below, busiest)):
        for k in range(1, K):
            axis.axhline(rows * k - 0.5, color="grey", lw=0.8)
    below.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=f"bank {k}") for k, c in enumerate(colours)],
        ncols=K,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.06),
        frameon=False,
    )
    figure.savefig(path, dpi=120)
    share = writes.sum((0, 2)) / writes.sum()
    print("share of all writing by bank: " + ", ".join(f"{k}: {s:.0%}" for k, s in enumerate(share)))
