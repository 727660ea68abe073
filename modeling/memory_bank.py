"""Banks of learned memory tokens and the layer that reads them, whole or by chapters.

    bank = MemoryBank(num_memory_tokens, width, bank_type, bank_rank, num_chapters, quantization)
    read = MemoryRead(hidden_size, bank.width, num_heads, num_chapters=bank.num_chapters, routing="token", ...)
    output, new_state, router_logits = read(hidden_states, bank, state, mask)

A bank holds parameters only, so several layers may read one. A read adds W_o softmax(Q K' / sqrt(dh)) V with K, V = M
W_k', M W_v' of the bank M; W_o = 0 at the start, so a model with a new memory computes what it did without. Both are
used by the `memory_bank_transformer` family and by the PEFT adapter.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.bank_attention import bank_attention, bank_attention_loaded
from memzoo.kernels.bank_step import BankStep, BankWeights
from memzoo.kernels.normed_linear import normed_linear
from memzoo.kernels.rms_norm import rms_norm
from memzoo.modeling.chapter_router import ChapterRouter, Choice, Routing
from memzoo.modeling.quantized_bank import Format, check_format, code_columns, dequantize, fake_quantize, quantize

BankType = Literal["standard", "factorized", "reduced"]


class MemoryBank(nn.Module):
    """N learned memory tokens M, in C chapters of N / C.

    standard: M [N, width]. factorized: M = A B' with A [N, rank], B [width, rank]; keys and values are A (W B)', M
    itself is never formed. reduced: M [N, rank], and readers are as narrow as it.

    Args:
        width: of a memory token; `self.width` is what readers must be built for: rank when reduced.
        bank_rank: of factorized and reduced banks.
        num_chapters: chapters that readers may choose from; 1 for none.
        quantization: "int8" or "int4" rows: a fixed bank that is read without ever being expanded as a whole.
        quantization_aware: train float rows that are read as the format would return them.

    Raises:
        ValueError: chapters that do not divide the tokens, a missing or too large rank, an unknown format.
    """

    def __init__(
        self,
        num_memory_tokens: int,
        width: int,
        bank_type: BankType = "standard",
        bank_rank: int | None = None,
        num_chapters: int = 1,
        quantization: Format | None = None,
        quantization_aware: bool = False,
    ) -> None:
        super().__init__()
        check_format(quantization)
        if num_memory_tokens < 1 or num_chapters < 1 or num_memory_tokens % num_chapters:
            raise ValueError(f"num_chapters {num_chapters} does not divide the {num_memory_tokens} memory tokens")
        if bank_type not in ("standard", "factorized", "reduced"):
            raise ValueError(f"bank_type must be standard, factorized or reduced, not {bank_type!r}")
        if bank_type != "standard" and not 1 <= (bank_rank or 0) <= width:
            raise ValueError(f"a {bank_type} bank needs a rank between 1 and its width {width}, not {bank_rank}")
        if quantization_aware and quantization is None:
            raise ValueError("quantization_aware needs a quantization format")
        stored = width if bank_type == "standard" else int(bank_rank)
        self.num_memory_tokens, self.num_chapters, self.bank_type = num_memory_tokens, num_chapters, bank_type
        self.width = stored if bank_type == "reduced" else width
        self.stored_width, self.quantization = stored, quantization
        self.quantized = quantization is not None and not quantization_aware
        if self.quantized:
            code = torch.int8 if quantization == "int8" else torch.uint8
            columns = code_columns(stored, quantization)
            self.register_buffer("codes", torch.zeros(num_memory_tokens, columns, dtype=code))
            self.register_buffer("scale", torch.zeros(num_memory_tokens, 1))
        else:
            self.weight = nn.Parameter(torch.empty(num_memory_tokens, stored))
        self.basis = nn.Parameter(torch.empty(width, stored)) if bank_type == "factorized" else None
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Memory tokens of standard deviation `std`."""
        if self.quantized:
            rows = torch.empty(self.num_memory_tokens, self.stored_width).normal_(std=std)
            if self.codes.device.type != "meta":
                codes, scale = quantize(rows, self.quantization)
                init.copy_(self.codes, codes)
                init.copy_(self.scale, scale)
        else:
            init.normal_(self.weight, std=std)
        if self.basis is not None:
            init.normal_(self.basis, std=self.stored_width**-0.5)

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Stored rows [n, stored width] of these memory tokens, in floating point."""
        if self.quantized:
            return dequantize(self.codes[at], self.scale[at], self.quantization, self.stored_width)
        if isinstance(at, Tensor):
            rows = self.weight.index_select(0, at)  # whose gradient, unlike an index's, is added by all threads
        else:
            rows = self.weight if at == slice(None) else self.weight[at]
        return rows if self.quantization is None else fake_quantize(rows, self.quantization)

    def fold(self, weight: Tensor) -> Tensor:
        """The matrix that projects stored rows as `weight` [out, width] projects memory tokens."""
        return weight if self.basis is None else weight @ self.basis

    def tokens(self) -> Tensor:
        """M [N, width], expanded."""
        return self.rows() if self.basis is None else self.rows() @ self.basis.mT

    def quantize(self, quantization: Format) -> "MemoryBank":
        """This bank in 8 or 4 bits, for reading only."""
        kind = {**self.description(), "quantization": quantization, "quantization_aware": False}
        other = MemoryBank(**kind).to(self.rows(slice(0, 1)).device)
        with torch.no_grad():
            codes, scale = quantize(self.rows(), quantization)
            other.codes.copy_(codes)
            other.scale.copy_(scale)
            if self.basis is not None:
                other.basis.copy_(self.basis)
        return other

    def description(self) -> dict[str, Any]:
        """The arguments that build a bank of this kind."""
        return {
            "num_memory_tokens": self.num_memory_tokens,
            "width": self.width,
            "bank_type": self.bank_type,
            "bank_rank": None if self.bank_type == "standard" else self.stored_width,
            "num_chapters": self.num_chapters,
            "quantization": self.quantization,
            "quantization_aware": self.quantization is not None and not self.quantized,
        }

    def footprint(self) -> dict[str, int]:
        """Bytes that the bank takes, and that its rows would take in float32."""
        own = sum(x.nbytes for x in (*self.parameters(), *self.buffers()))
        basis = 0 if self.basis is None else 4 * self.basis.numel()
        return {"bytes": own, "float32_bytes": 4 * self.num_memory_tokens * self.stored_width + basis}

    def extra_repr(self) -> str:
        form = f", {self.quantization}" if self.quantization else ""
        return f"{self.num_memory_tokens} x {self.width}, {self.bank_type}, chapters={self.num_chapters}{form}"


class LowRankLinear(nn.Module):
    """A linear map of rank r, W = U D."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def _stamp(x: Tensor) -> tuple[int, int]:
    return x._version, x.data_ptr()


def _parts(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any, tuple[int, int] | None]]:
    """Everything that a module computes with: which dict holds it, by what name, and the stamp of a tensor.

    Looking these up again takes a third of what `parameters()` does, at every layer and token.
    """
    for child in module.modules():
        yield from ((child._modules, name, x, None) for name, x in child._modules.items())
        for found in (child._parameters, child._buffers):
            yield from ((found, name, x, _stamp(x)) for name, x in found.items() if x is not None)


class _Kept(NamedTuple):
    """Keys and values of a bank, and what was there when they were projected."""

    bank: MemoryBank
    parts: list[Any]  # of `_parts`
    k: Tensor
    v: Tensor
    step: BankStep | None

    def is_fresh(self) -> bool:
        for of, name, x, stamp in self.parts:
            if of.get(name) is not x or (stamp is not None and (x._version, x.data_ptr()) != stamp):
                return False
        return True


class MemoryRead(nn.Module):
    """x [B, T, D] -> [B, T, D], what each token reads from a bank.

    Its state is the router's (`chapter_router.py`): empty without routing and with "token".

    Args:
        width: of the bank's tokens (`bank.width`) and of the attention.
        num_heads, num_kv_heads: query heads, and heads of the bank's keys and values (None: as many).
        num_chapters: of the bank; 1 reads it whole. The first `num_shared_chapters` are always read, the router
            chooses `top_k_chapters` of the others.
        routing, block_size, normalize_weights, product_keys: see `ChapterRouter`.
        mixing: one softmax over all chapters that a token reads, or one each ("separate").
        routed_scaling_factor: of the routed chapters' weights.
        projection_rank: rank of the four projections, None for full.
        dropout: on what is read, while training.
        zero_init: W_o = 0 at the start.
        norm_eps: of a norm without weights that the input goes through first; None for an input that has a norm.

    Raises:
        ValueError: heads that do not divide the width, or a choice of more chapters than there are.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_chapters: int = 1,
        routing: Routing = "token",
        top_k_chapters: int = 1,
        num_shared_chapters: int = 0,
        mixing: Literal["joint", "separate"] = "joint",
        routed_scaling_factor: float = 1.0,
        block_size: int = 128,
        normalize_weights: bool = True,
        product_keys: bool = False,
        projection_rank: int | None = None,
        dropout: float = 0.0,
        zero_init: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_kv_heads or num_heads
        if width % num_heads or num_heads % kv_heads:
            raise ValueError(
                f"a memory of width {width} cannot have {num_heads} heads with {kv_heads} key heads: each must divide "
                "the one before"
            )
        if mixing not in ("joint", "separate"):
            raise ValueError(f"mixing must be 'joint' or 'separate', not {mixing!r}")
        if num_chapters > 1 and not 0 <= num_shared_chapters < num_chapters:
            raise ValueError(f"{num_shared_chapters} shared chapters leave none of {num_chapters} to route to")
        if routed_scaling_factor <= 0:
            raise ValueError(f"routed_scaling_factor must be positive, not {routed_scaling_factor}")
        self.width, self.num_heads, self.kv_heads, self.head_dim = width, num_heads, kv_heads, width // num_heads
        self.num_chapters, self.num_shared, self.mixing = num_chapters, num_shared_chapters, mixing
        self.routed_scaling_factor, self.zero_init, self.norm_eps = routed_scaling_factor, zero_init, norm_eps

        def linear(inputs: int, outputs: int) -> nn.Module:
            if projection_rank is None:
                return nn.Linear(inputs, outputs, bias=False)
            return LowRankLinear(inputs, outputs, projection_rank)

        self.q_proj = linear(hidden_size, width)
        self.k_proj = linear(width, kv_heads * self.head_dim)
        self.v_proj = linear(width, kv_heads * self.head_dim)
        self.o_proj = linear(width, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.router = None
        if num_chapters > 1:
            routed = num_chapters - num_shared_chapters
            options = (routing, block_size, normalize_weights, product_keys)
            self.router = ChapterRouter(hidden_size, routed, top_k_chapters, *options)
        self._cached: _Kept | None = None

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Normal with `std`, W_o zero. For a model that has initialised its linear layers already, only the latter."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            for layer in [proj] if isinstance(proj, nn.Linear) else [proj.down, proj.up]:
                init.normal_(layer.weight, std=std)
        if self.zero_init:
            init.zeros_(self.o_proj.weight if isinstance(self.o_proj, nn.Linear) else self.o_proj.up.weight)

    def forward(
        self,
        hidden_states: Tensor,
        bank: MemoryBank,
        state: dict[str, Tensor],
        mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first; `prompt_lengths` [B]: see the router.

        Returns the output, the new state, and the router's logits [B, T, C] (-inf where not routed), None without one.
        """
        self._check(bank)
        if mask is None and (step := self.step(hidden_states, bank)) is not None:
            return step[0], {}, step[1]
        q, choice, new_state = self._queries(hidden_states, state, mask, prompt_lengths)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        chapters, log_weights, logits = choice or (None, None, None)
        if chapters is not None and self.num_shared:
            chapters = torch.where(chapters < 0, -1, chapters + self.num_shared)
        if log_weights is not None and self.routed_scaling_factor != 1:
            log_weights = log_weights + math.log(self.routed_scaling_factor)
        if bank.quantized and not torch.is_grad_enabled():
            out = self._read_in_parts(q, bank, chapters, log_weights)
        else:
            k, v, count, chapters = self._keys_values(bank, chapters)
            out = bank_attention(q, k, v, chapters, log_weights, count, self.num_shared, self.mixing)
        out = self.o_proj(out.flatten(-2))
        return self.dropout(out) if self.training else out, new_state, logits

    def step(self, hidden_states: Tensor, bank: MemoryBank) -> tuple[Tensor, Tensor | None] | None:
        """As `forward` of one token a sequence that is no pad, compiled: the output and the router's logits.

        None where that does not fit: then `forward` has other ways.
        """
        if self.training or torch.compiler.is_compiling() or torch.is_grad_enabled() or hidden_states.shape[1] != 1:
            return None
        kept = self._kept(bank)
        return None if kept is None or kept.step is None else kept.step(hidden_states)

    def _queries(
        self, x: Tensor, state: dict[str, Tensor], mask: Tensor | None, prompt_lengths: Tensor | None
    ) -> tuple[Tensor, Choice | None, dict[str, Tensor]]:
        """[B, T, width], the router's choice and its new state."""
        router = self.router
        if self.norm_eps is not None:
            weight: Any = self.q_proj.weight
            plain = type(self.q_proj) is nn.Linear and weight.dtype == x.dtype
            if plain and router is None:
                return normed_linear(x, [weight], self.norm_eps)[0], None, {}
            if plain and router is not None and router.routing == "token" and router.gate.weight.dtype == x.dtype:
                q, logits = normed_linear(x, [weight, router.gate.weight], self.norm_eps)
                logits = (logits + router.gate.bias).to(torch.promote_types(x.dtype, torch.float32))
                return q, router.decide(logits, None if mask is None else mask.bool()), {}
            x = rms_norm(x, None, self.norm_eps)
        choice, new_state = (None, {}) if router is None else router(x, state, mask, prompt_lengths)
        return self.q_proj(x), choice, new_state

    def _check(self, bank: MemoryBank) -> None:
        if bank.width != self.width:
            raise ValueError(f"the bank's tokens are {bank.width} wide and this layer reads tokens of {self.width}")
        if bank.num_chapters != self.num_chapters:
            raise ValueError(f"the bank has {bank.num_chapters} chapters and this layer routes to {self.num_chapters}")

    def _keys_values(self, bank: MemoryBank, chapters: Tensor | None) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """k, v [Hk, n, dh] of the bank, or while training of the chapters that were chosen, and these renumbered."""
        if torch.is_grad_enabled():
            self._cached = None  # a step of a fused optimizer may follow, which no weight's _version shows
        if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kept = self._kept(bank)
            k, v = self._project(bank, bank.rows()) if kept is None else (kept.k, kept.v)
            return k, v, self.num_chapters, chapters
        if chapters is None or torch.compiler.is_compiling():
            return *self._project(bank, bank.rows()), self.num_chapters, chapters
        used = (chapters + 1).flatten().bincount(minlength=self.num_chapters + 1)[1:] > 0
        used[: max(self.num_shared, 1)] = True  # the first also when nothing is read: there must be a key
        if 2 * int(used.sum()) > self.num_chapters:  # gathering rows costs more than projecting a few too many
            return *self._project(bank, bank.rows()), self.num_chapters, chapters
        at = used.repeat_interleave(bank.num_memory_tokens // self.num_chapters).nonzero()[:, 0]
        place = (used.cumsum(0) - 1)[chapters.clamp_min(0)]
        return *self._project(bank, bank.rows(at)), int(used.sum()), torch.where(chapters < 0, -1, place)

    def _project(self, bank: MemoryBank, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Stored rows [n, w] -> k, v [Hk, n, dh]."""
        heads: Any = (self.k_proj.weight, self.v_proj.weight)
        weight = bank.fold(torch.cat(heads))  # one product, and one of its gradient
        both = F.linear(rows.to(weight.dtype), weight).unflatten(1, (2, self.kv_heads, -1)).permute(1, 2, 0, 3)
        k, v = both.to(rows.dtype).contiguous().unbind(0)
        return k, v

    def _kept(self, bank: MemoryBank) -> _Kept | None:
        """What evaluation keeps until a weight is replaced or changed in place; None where it must not be kept.

        A change through `.data` is seen only after the next `train()` or `eval()`.
        """
        kept = self._cached
        if kept is None or kept.bank is not bank or not kept.is_fresh():
            kept = self._cached = self._keep(bank)
        return None if kept is None or torch.is_autocast_enabled(kept.k.device.type) else kept

    def _keep(self, bank: MemoryBank) -> _Kept | None:
        modules = [bank, *(module for module in self.children() if module is not self.dropout)]
        weights = [x for module in modules for x in module.parameters()]
        if (
            bank.quantized
            or torch.is_autocast_enabled(weights[0].device.type)
            or any(x.is_inference() for x in weights)
        ):
            return None
        with torch.inference_mode(False), torch.no_grad():
            k, v = self._project(bank, bank.rows())
        places = [(self._modules, name, module, None) for name, module in self._modules.items()]
        parts = [*places, *(part for module in modules for part in _parts(module))]
        return _Kept(bank, parts, k, v, self._build_step(k, v))

    def _build_step(self, k: Tensor, v: Tensor) -> BankStep | None:
        router = self.router
        if self.mixing != "joint" or not type(self.q_proj) is type(self.o_proj) is nn.Linear:
            return None
        gate: tuple[Tensor | None, Tensor | None] = (None, None)
        options: dict[str, Any] = {}
        if router is not None:
            if router.routing != "token" or len(router.halves) > 1 or self.routed_scaling_factor != 1:
                return None
            gate = router.gate.weight, router.gate.bias
            options = {"top_k": router.top_k, "normalize": router.normalize}
        weights = BankWeights(self.q_proj.weight, *gate, k, v, self.o_proj.weight)
        if not BankStep.fits(weights):
            return None
        return BankStep(weights, self.num_chapters, self.num_shared, eps=self.norm_eps, **options)

    def train(self, mode: bool = True) -> "MemoryRead":
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached": None}

    def _read_in_parts(
        self, q: Tensor, bank: MemoryBank, chapters: Tensor | None, log_weights: Tensor | None
    ) -> Tensor:
        """Over a quantized bank, a chapter at a time, or when read whole by parts of up to 256 tokens.

        Few tokens project their queries onto the stored rows, many project the rows: whichever is less work.
        """
        B, T = q.shape[:2]
        N, parts = bank.num_memory_tokens, self.num_chapters
        if chapters is None:
            parts = next(n for n in range(-(-N // 256), N + 1) if N % n == 0)
        readers = B * T if chapters is None else B * T * chapters.shape[2] / (parts - self.num_shared)
        arguments = (chapters, log_weights, parts, self.num_shared, self.mixing, self.head_dim**-0.5)
        if readers >= self.head_dim:
            projected = lambda first, last: self._project(bank, bank.rows(slice(first, last)).to(q.dtype))  # noqa: E731
            return bank_attention_loaded(q, projected, (self.kv_heads, N), *arguments)
        groups = self.num_heads // self.kv_heads
        key, value = (
            bank.fold(proj.weight).unflatten(0, (self.kv_heads, -1)).repeat_interleave(groups, 0)  # [H, dh, w]
            for proj in (self.k_proj, self.v_proj)
        )

        def stored(first: int, last: int) -> tuple[Tensor, Tensor]:
            rows = bank.rows(slice(first, last))[None].to(torch.promote_types(q.dtype, torch.float32))
            return rows, rows

        q = torch.einsum("bthd,hdw->bthw", q, key.to(q.dtype))
        read = bank_attention_loaded(q, stored, (1, N), *arguments)
        return torch.einsum("bthw,hdw->bthd", read, value.to(read.dtype))
