"""Pictures of a memory bank: chapters and memory tokens that each token reads, and the router's load over training.

`show_bank` writes chapters.png, attention.png, router_load.png (of a model that has its run's log beside it) and
bank.html, one page with the text and the pictures that needs nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from memzoo.kernels.bank_attention import bank_attention
from memzoo.modeling.chapter_router import choose
from memzoo.modeling.memory_bank import MemoryRead
from memzoo.modeling.statistics import record_calls
from memzoo.training.bank_page import write_page
from memzoo.training.data.packing import frame
from memzoo.training.distill.seeding import seen_by

MOST_LABELS = 80  # tokens named on an axis


@dataclass
class Reading:
    """What one layer reads; the first `num_shared` chapters are read by every token."""

    name: str
    attention: Tensor  # [T, N] weights of the memory tokens, mean over heads
    load: Tensor  # [T, C] their sums by chapter
    chosen: Tensor  # [T, k] routed chapters, best first; -1 where a token is not routed, k = 0 without chapters
    num_shared: int

    @property
    def num_chapters(self) -> int:
        return self.load.shape[1]

    @property
    def in_use(self) -> float:
        """Memory tokens that the text reads, exp of the entropy of its mean attention: N if it reads all alike.

        Chapters that are chosen evenly may still hardly be read, where a shared one takes the softmax.
        """
        share = self.attention.sum(0) / self.attention.sum()
        return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def readings(model: Any, ids: Tensor) -> list[Reading]:
    """What every layer with a bank reads from it for ids [T].

    Raises:
        ValueError: no layer reads a bank.
    """
    reads = {module: name for name, module in model.named_modules() if isinstance(module, MemoryRead)}
    with record_calls(reads) as calls:
        model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
    found = [_reading(_short(name), read, *call) for read, name in reads.items() for call in calls[read]]
    if not found:
        raise ValueError(f"{type(model).__name__} read no memory bank")
    layers = [reading.name for reading in found]
    for i, reading in enumerate(found):
        if layers.count(reading.name) > 1:  # several tiers in one layer
            reading.name += f", read {layers[:i].count(layers[i]) + 1}"
    return found


def _reading(name: str, read: MemoryRead, args: tuple, output: tuple) -> Reading:
    x, bank = args[:2]
    q = read.q_proj(seen_by(read, x)).unflatten(-1, (read.num_heads, read.head_dim)).float()
    rows = bank.rows()
    k = (rows.float() @ bank.fold(read.k_proj.weight).float().mT).unflatten(1, (read.kv_heads, -1)).transpose(0, 1)
    each = torch.eye(len(rows), device=k.device).expand(read.kv_heads, -1, -1)  # values that say which token was read
    if read.router is None:
        chosen = torch.empty(x.shape[1], 0, dtype=torch.long)
        attention = bank_attention(q, k, each)
    else:
        logits = output[2]
        routed = logits[..., :1].isfinite()
        chapters, log_w = choose(torch.where(routed, logits, 0.0), read.router.halves, read.router.top_k)
        log_w = log_w.log_softmax(-1) if read.router.normalize else log_w
        log_w = log_w + torch.tensor(read.routed_scaling_factor).log()
        chapters = torch.where(routed, chapters + read.num_shared, -1)
        options = (bank.num_chapters, read.num_shared, read.mixing)
        attention = bank_attention(q, k, each, chapters, log_w, *options)
        chosen = chapters[0].cpu()
    attention = attention[0].mean(1).cpu()  # [T, N]
    load = attention.unflatten(1, (bank.num_chapters, -1)).sum(-1)
    return Reading(name, attention, load, chosen, read.num_shared)


def _short(name: str) -> str:
    """`layer 3` of model.layers.3.memory.0 and the like."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name


def token_labels(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode([i]).replace("\n", "\\n") or "·" for i in ids.tolist()]


def plot_chapters(found: list[Reading], labels: list[str], path: Path) -> None:
    """Share of each token's read by chapter, a panel a layer; a dot marks what the router chose."""
    figure, axes = _panels(len(found), len(labels), max(reading.num_chapters for reading in found))
    for ax, reading in zip(axes, found):
        image = ax.imshow(reading.load.T.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        at = [(t, c) for t, row in enumerate(reading.chosen.tolist()) for c in row if c >= 0]
        if at and len(labels) <= MOST_LABELS:
            ax.scatter(*zip(*at), s=7, color="tab:orange", linewidths=0)
        ax.set(title=reading.name, ylabel="chapter")
        _name_tokens(ax, labels)
    figure.colorbar(image, ax=axes, label="share read (dot: chosen)", fraction=0.02, pad=0.01)
    _save(figure, path)


def plot_attention(found: list[Reading], labels: list[str], path: Path) -> None:
    """Attention of each token over the memory tokens, mean over heads, a panel a layer."""
    figure, axes = _panels(len(found), len(labels), 24)
    for ax, reading in zip(axes, found):
        size = reading.attention.shape[1]
        image = ax.imshow(
            reading.attention.T.numpy() * size, aspect="auto", cmap="magma", vmin=0, interpolation="nearest"
        )
        for c in range(1, reading.num_chapters):
            ax.axhline(c * size / reading.num_chapters - 0.5, color="white", lw=0.4, alpha=0.6)
        ax.set(title=f"{reading.name}: {reading.in_use:.0f} of {size} memory tokens in use", ylabel="memory token")
        figure.colorbar(image, ax=ax, label="x even share", fraction=0.02, pad=0.01)
        _name_tokens(ax, labels)
    _save(figure, path)


def plot_router_load(log_history: list[dict[str, Any]], path: Path) -> bool:
    """Mean probability of the most and the least used chapter, and chapters in use, over the steps of a run.

    Of what `MemoryStatistics` logged at every evaluation; False, and no picture, if no router did.
    """
    logs = [log for log in log_history if any(key.endswith("/max_load") for key in log)]
    layers = sorted({int(key.split("/")[1]) for log in logs for key in log if key.endswith("/max_load")})
    if not layers:
        return False
    steps = [log["step"] for log in logs]
    figure, (left, right) = _figure(ncols=2, figsize=(10, 3.8))
    for i, layer in enumerate(layers):
        top, low, used = (
            [log[f"memory/{layer}/{name}"] for log in logs] for name in ("max_load", "min_load", "chapters_used")
        )
        left.fill_between(steps, low, top, alpha=0.2, color=f"C{i}")
        left.plot(steps, top, "o-", ms=3, color=f"C{i}", label=f"memory layer {layer}")
        left.plot(steps, low, "o-", ms=3, color=f"C{i}")
        right.plot(steps, used, "o-", ms=3, color=f"C{i}")
    left.set(title="load of the most and the least used chapter", xlabel="step", ylabel="mean probability")
    right.set(title="routed chapters in use", xlabel="step", ylabel="share", ylim=(0, 1.05))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=min(len(layers), 6))
    _save(figure, path)
    return True


def show_bank(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, out: Path, run: Path | None = None
) -> list[Path]:
    """Write the pictures and the page for a text; `run` is the folder of a training run. Returns the files.

    Raises:
        ValueError: no text, or a model without banks.
    """
    body = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if not len(body):
        raise ValueError("--text: there is nothing to read")
    ids = torch.cat([torch.tensor(frame(tokenizer)[0], dtype=torch.long), body])
    found, labels = readings(model, ids), token_labels(ids, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "attention.png"]
    plot_attention(found, labels, files[0])
    if routed := [reading for reading in found if reading.num_chapters > 1]:
        files.insert(0, out / "chapters.png")
        plot_chapters(routed, labels, files[0])
    if run is not None and (state := _trainer_state(run)) is not None:
        file = out / "router_load.png"
        files += [file] if plot_router_load(json.loads(state.read_text())["log_history"], file) else []
    write_page(found, labels, files, out / "bank.html")
    return [*files, out / "bank.html"]


def _trainer_state(run: Path) -> Path | None:
    return run / TRAINER_STATE_NAME if (run / TRAINER_STATE_NAME).is_file() else None


def _figure(**options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained", **options)


def _panels(count: int, tokens: int, rows: int) -> Any:
    width, height = min(max(6.0, 0.19 * tokens + 2), 16), min(max(1.6, 0.14 * rows + 1.1), 5)
    figure, axes = _figure(nrows=count, figsize=(width, height * count), squeeze=False, sharex=True)
    return figure, list(axes[:, 0])


def _name_tokens(ax: Any, labels: list[str]) -> None:
    if len(labels) <= MOST_LABELS:
        ax.set_xticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], rotation=90, fontsize=7)
    else:
        ax.set_xlabel("token")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
