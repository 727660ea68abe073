"""Context distillation (arXiv 2209.15189; of documents into a prefix: Cartridges, arXiv 2506.06266) into memory banks.

The teacher is the model with the document in context, the student the same model with the bank and without the
document; the loss is KL(teacher || student) of every next token of texts that the teacher wrote. What was kept is
measured on other texts of the teacher: (NLL without - NLL with the bank) / (NLL without - NLL with the document).
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from memzoo.modeling.memory_bank import LowRankLinear, MemoryBank, MemoryRead
from memzoo.modeling.quantized_bank import Format
from memzoo.training.distill.seeding import cut_for_chapters, seed_chapters
from memzoo.training.distill.settings import Settings
from memzoo.training.distill.study import Study, Writer, encode_document

FALLBACK_CONTEXT = 1024  # tokens, of a model that names no limit


@dataclass
class Report:
    """Nats per token of the held-out continuations, and how the training went."""

    document_tokens: int
    windows: int
    held_out: Study = field(repr=False)  # what was measured with
    without_memory: float
    when_seeded: float | None  # with chapters of the document's passages, before training; None without seeding
    with_bank: float
    with_document: float
    gap_error: float  # standard error of without_memory - with_document, over the texts
    seconds: float
    losses: list[float] = field(repr=False)
    with_quantized_bank: float | None = None  # where one is asked for, see `quantized_nats`

    @property
    def kept(self) -> float | None:
        """1: as if the document was in context; 0: as without memory. None if it helps no more than chance."""
        gap = self.without_memory - self.with_document
        return (self.without_memory - self.with_bank) / gap if gap > 2 * self.gap_error else None

    def save(self, file: Path, settings: Settings) -> None:
        values = {x.name: getattr(self, x.name) for x in fields(self) if x.name != "held_out"}
        values |= {"held_out_tokens": self.held_out.nats.numel(), "kept": self.kept, "settings": asdict(settings)}
        file.write_text(json.dumps(values, indent=2) + "\n")


def distill(model: Any, tokenizer: PreTrainedTokenizerBase, document: str, settings: Settings | None = None) -> Report:
    """Train the banks of a model until it answers without the document as it did with it; shows progress bars.

    The model is a `memory_bank_transformer`, or a base with a memory adapter that is active and trainable. Its teacher
    is the model as it comes, so what its banks knew is not lost on purpose.

    Raises:
        ValueError: an empty document, a model without a bank, a bank that cannot be trained or seeded.
    """
    settings = settings or Settings()
    ids = encode_document(document, tokenizer)
    groups = _parameter_groups(model, settings)
    passages = cut_for_chapters(model, ids) if settings.seed_chapters else {}
    begin = time.perf_counter()
    mode = model.training
    model.eval()  # no dropout in teacher or student
    writer = Writer(
        model,
        tokenizer,
        settings.context or context_of(model),
        settings.opening,
        settings.length,
        settings.top_k,
        settings.seed,
    )
    with tqdm(total=settings.continuations + settings.held_out, desc="teacher writes", unit="text") as bar:
        counts = settings.continuations, settings.held_out
        learn, measure = writer.write(ids, *counts, bar.update)
    without = text_nats(model, measure, settings.batch_size)
    for chapters in passages.values():
        seed_chapters(model, chapters, writer.start, context=writer.context)
    seeded = mean_nats(model, measure, settings.batch_size) if passages else None
    with _training_only(model, [p for group in groups for p in group["params"]]):
        losses = _train(model, groups, learn, settings)
    report = Report(
        document_tokens=len(ids),
        windows=-(-len(ids) // (writer.context - writer.reserved)),
        held_out=measure,
        without_memory=without.mean().item(),
        when_seeded=seeded,
        with_bank=mean_nats(model, measure, settings.batch_size),
        with_document=measure.nats.double().mean().item(),
        gap_error=(without - measure.nats.double().mean(1).cpu()).std().item() / len(measure) ** 0.5,
        seconds=time.perf_counter() - begin,
        losses=losses,
    )
    model.train(mode)
    return report


def banks_of(model: nn.Module) -> list[MemoryBank]:
    return [module for module in model.modules() if isinstance(module, MemoryBank)]


def context_of(model: Any) -> int:
    """Tokens that the model sees at once: its sliding window, or the positions it was trained on."""
    config = model.config
    return (
        getattr(config, "sliding_window", None) or getattr(config, "max_position_embeddings", None) or FALLBACK_CONTEXT
    )


def kl_divergence(log_p: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) [...] of p's k likeliest tokens [..., k] and of all others as one event.

    With k below the vocabulary it is a lower bound of the divergence, and 0 only where these agree.
    """
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(-1, tokens)
    tiny = torch.finfo(log_q.dtype).eps
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp_min(tiny) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


def mean_nats(model: Any, study: Study, batch_size: int) -> float:
    """-log p of the continuations' tokens without the document, mean."""
    return text_nats(model, study, batch_size).mean().item()


@torch.no_grad()
def text_nats(model: Any, study: Study, batch_size: int) -> Tensor:
    """The same of each text [n], in float64 on the CPU."""
    length, found = study.nats.shape[1], []
    for at in torch.arange(len(study)).split(batch_size):
        ids = study.ids[at]
        logits = model(input_ids=ids, use_cache=False).logits[:, -length - 1 : -1]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(-log_p.gather(-1, ids[:, -length:, None])[..., 0].double().mean(1).cpu())
    return torch.cat(found)


@torch.no_grad()
def quantized_nats(model: Any, study: Study, batch_size: int, quantization: Format) -> float:
    """`mean_nats` with the banks as they would be read in 8 or 4 bits; they stay as they are."""
    banks = banks_of(model)
    before: list[Tensor] = [bank.weight.clone() for bank in banks]
    for bank in banks:
        bank.weight.copy_(bank.quantize(quantization).rows())
    found = mean_nats(model, study, batch_size)
    for bank, rows in zip(banks, before):
        bank.weight.copy_(rows)
    return found


def _train(model: Any, groups: list[dict[str, Any]], study: Study, settings: Settings) -> list[float]:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    size, order = min(settings.batch_size, len(study)), torch.empty(0, dtype=torch.long)
    with tqdm(range(settings.steps), desc="bank learns", unit="step") as bar:
        for _ in bar:
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(study), generator=generator)])
            at, order = order[:size], order[size:]
            batch = study[at]
            logits = model(input_ids=batch.ids, use_cache=False).logits[:, batch.num_start : -1]
            loss = kl_divergence(batch.log_p, batch.tokens, logits).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(KL=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    return losses


def _parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """What is trained. Of a model with adapters, only what PEFT lets train: the active one.

    Raises:
        ValueError: saying why nothing could be learned.
    """
    adapted = hasattr(model, "peft_config")
    parts: dict[type, list[nn.Parameter]] = {MemoryBank: [], MemoryRead: []}
    reads = [module for module in model.modules() if isinstance(module, MemoryRead)]
    for module in (*banks_of(model), *reads):
        own = [p for p in module.parameters() if p.requires_grad or not adapted]
        parts[MemoryBank if isinstance(module, MemoryBank) else MemoryRead] += own
    if not banks_of(model):
        raise ValueError(f"{type(model).__name__} has no memory bank to distil into; see MemoryConfig")
    if any(bank.quantized for bank in banks_of(model)):
        formats = {bank.quantization for bank in banks_of(model)}
        raise ValueError(
            f"a bank in {', '.join(map(str, formats))} is for reading only; distil into one in floating point, then "
            "`bank.quantize(...)`"
        )
    if not parts[MemoryBank]:
        raise ValueError("the adapter's bank is frozen: load it with is_trainable=True")
    if settings.train == "bank" and not any(_output(read).count_nonzero() for read in reads):
        raise ValueError(
            "every read's output projection is zero, so a bank alone cannot change anything: use train='read'"
        )
    groups = [{"params": parts[MemoryBank], "lr": settings.bank_learning_rate}]
    if settings.train == "read":
        groups.append({"params": parts[MemoryRead], "lr": settings.read_learning_rate})
    return groups


def _output(read: MemoryRead) -> Tensor:
    last: Any = read.o_proj.up if isinstance(read.o_proj, LowRankLinear) else read.o_proj
    return last.weight


@contextmanager
def _training_only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Only these have a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in parameters}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)
            p.grad = None
