"""Causal self-attention whose keys and values are a memory state: full, or over a sliding window at O(T w).

Pads are moved to the right of each row before the layers (`padding.py`), so in a row the index of a key is its place
in the text: the remembered keys end where the new ones begin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memzoo.kernels.window_attention import window_attention


class CausalSelfAttention(nn.Module):
    """x [B, T, D] -> [B, T, D]: token i attends to j iff 0 <= i - j < window, and to every persistent token.

    Rotary positions (arXiv 2104.09864) count each row's real tokens. Persistent tokens (arXiv 2501.00663, section 3.3)
    are learned keys and values without a position; they never see the text.

    Its state is `keys` and `values` [B, Hkv, L, d], right-aligned, and `tokens` [B] int64, how many were read. With a
    window, L is window - 1 always; without, L is the longest row, and grows.

    Args:
        num_key_value_heads: heads of keys and values, shared by groups of query heads; None is num_heads.
        head_dim: width of a head; None is hidden_size / num_heads.
        window: tokens that a token sees, itself included; None for all.
        num_persistent_tokens: learned keys and values per head.
        rope_theta: base of the rotary frequencies.
        bias: in the four projections. dropout: of attention weights, while training.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        num_persistent_tokens: int = 0,
        rope_theta: float = 10000.0,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = num_key_value_heads or num_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        if num_heads % kv_heads:
            raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"the attention window must be at least 1 token, not {window}")
        self.head_dim = head_dim or hidden_size // num_heads
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        self.groups, self.window, self.rope_theta, self.dropout = num_heads // kv_heads, window, rope_theta, dropout
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.persistent = None
        if num_persistent_tokens:
            self.persistent = nn.Parameter(torch.empty(2, kv_heads, num_persistent_tokens, self.head_dim))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The persistent keys and values, normal with `std`; the projections are initialised as linear layers."""
        if self.persistent is not None:
            init.normal_(self.persistent, std=std)

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        B, T, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        tokens = state["tokens"] if state else torch.zeros(B, dtype=torch.int64, device=q.device)
        q, k = apply_rotary_pos_emb(q, k, *self._rotary(tokens, T, q.dtype), unsqueeze_dim=2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, T, d], as in the state
        if state:
            k, v = torch.cat([state["keys"].to(k.dtype), k], 2), torch.cat([state["values"].to(v.dtype), v], 2)
        first = (k.shape[2] - T - tokens).clamp_min(0) if state else None  # [B] index of each row's first key
        y = self.attend(q, k.transpose(1, 2), v.transpose(1, 2), first)
        new_tokens = T if mask is None else mask.sum(1)
        new_state = self._remember(k, v, tokens + new_tokens, None if mask is None else T - new_tokens)
        return self.o_proj(y.flatten(2)), new_state

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor | None,
        per: int = 1,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """q [B, T, H, d] over k, v [B, (past + T) per, Hkv, d], `per` keys a token, those before `first` [B] do not
        exist, and over all of `context`, keys and values [B, M, Hkv, d]."""
        if first is not None and first.device.type == "cpu" and not torch.compiler.is_compiling() and not first.any():
            first = None
        if self.persistent is not None:
            keys, values = self.persistent.transpose(1, 2)[:, None].expand(-1, len(k), -1, -1, -1)  # [B, P, Hkv, d]
            if context is not None:
                keys, values = _join(keys, context[0]), _join(values, context[1])
            context = (keys, values)
        dropout = self.dropout if self.training else 0.0
        return window_attention(q, k, v, self.window, context, first, per, dropout)

    def _rotary(self, tokens: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, d]; angles in float64, as positions may be large."""
        device = tokens.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        half = torch.arange(0, self.head_dim, 2, dtype=wide, device=device) / self.head_dim
        positions = tokens[:, None] + torch.arange(T, device=device)
        angles = positions[..., None] * self.rope_theta**-half
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _remember(self, k: Tensor, v: Tensor, tokens: Tensor, pads: Tensor | None) -> dict[str, Tensor]:
        """The keys and values that later tokens can see, right-aligned, zero before a row's first."""
        length = k.shape[2]
        if pads is not None:  # rows end at different places
            index = (torch.arange(length, device=k.device) - pads[:, None]).clamp_min(0)
            index = index[:, None, :, None].expand_as(k)
            k, v = k.gather(2, index), v.gather(2, index)
        keep = self.window - 1 if self.window is not None else length if pads is None else int(tokens.max())
        start = max(length - keep, 0)
        k, v = (F.pad(x[:, :, start:], (0, 0, max(keep - length, 0), 0)) for x in (k, v))
        if pads is not None:
            real = torch.arange(keep, device=k.device) >= (keep - tokens)[:, None]
            k, v = k * real[:, None, :, None], v * real[:, None, :, None]
        return {"keys": k, "values": v, "tokens": tokens}


def _join(first: Tensor, then: Tensor) -> Tensor:
    return torch.cat([first.to(then.dtype), then], 1)
