"""Causal self-attention whose keys and values are a memory state: full, or over a sliding window at O(T w).

Pads are moved to the right of each row before the layers (`padding.py`), so in a row the index of a key is its place
in the text: the remembered keys end where the new ones begin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


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
            proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        tokens = state["tokens"] if state else torch.zeros(B, dtype=torch.int64, device=q.device)
        q, k = apply_rotary_pos_emb(q, k, *self._rotary(tokens, T, q.dtype))
        if state:
            k, v = torch.cat([state["keys"].to(k.dtype), k], 2), torch.cat([state["values"].to(v.dtype), v], 2)
        past = k.shape[2] - T
        first = (past - tokens).clamp_min(0)  # [B] index of each row's first key
        y = self._attend(q, k, v, first, past)
        new_tokens = T if mask is None else mask.sum(1)
        new_state = self._remember(k, v, tokens + new_tokens, None if mask is None else T - new_tokens)
        return self.o_proj(y.transpose(1, 2).flatten(2)), new_state

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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, past: int) -> Tensor:
        """q [B, H, T, d] over k, v [B, Hkv, past + T, d], of which those before `first` [B] do not exist."""
        T, w = q.shape[2], self.window
        ragged = torch.compiler.is_compiling() or first.device.type != "cpu" or bool(first.any())
        if w is not None and max(w, 16) < T:
            return self._attend_in_blocks(q, k, v, first, past, w)
        causal = w is None or w >= past + T
        if self.persistent is None and not ragged and causal and (past == 0 or T == 1):
            return self._sdpa(q, k, v, None, is_causal=T > 1)
        i = torch.arange(past, past + T, device=q.device)[:, None]
        j = torch.arange(past + T, device=q.device)
        seen = j <= i
        if w is not None:
            seen = seen & (i - j < w)
        seen = seen[None, None]
        if ragged:
            seen = seen & (j >= first[:, None])[:, None, None]
        return self._sdpa(q, k, v, seen)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, past: int, w: int) -> Tensor:
        """Blocks of C queries, each over its own and the m blocks of keys before it, as a larger batch."""
        B, _, T, _ = q.shape
        C = max(16, min(w, 128))
        n, m = -(-T // C), -(-(w - 1) // C)  # blocks of queries, and of keys before each
        left, right = m * C - past, n * C - T
        q = F.pad(q, (0, 0, 0, right)).unflatten(2, (n, C)).transpose(1, 2).flatten(0, 1)  # [B n, H, C, d]
        k, v = (F.pad(x, (0, 0, left, right)).unflatten(2, (m + n, C)) for x in (k, v))
        k, v = (
            torch.cat([x[:, :, i : i + n] for i in range(m + 1)], 3).transpose(1, 2).flatten(0, 1) for x in (k, v)
        )  # [B n, Hkv, (m + 1) C, d]
        i = torch.arange(m * C, (m + 1) * C, device=q.device)[:, None]
        j = torch.arange((m + 1) * C, device=q.device)
        band = (j <= i) & (i < j + w)  # [C, (m + 1) C]
        place = torch.arange(n, device=q.device)[:, None] * C + j  # [n, (m + 1) C] index of each key
        exists = place >= (first + left)[:, None, None]  # [B, n, (m + 1) C]
        seen = (band & exists[:, :, None]).flatten(0, 1)[:, None]  # [B n, 1, C, (m + 1) C]
        y = self._sdpa(q, k, v, seen)
        return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, is_causal: bool = False) -> Tensor:
        if self.persistent is not None:
            persistent = self.persistent[:, None].expand(-1, k.shape[0], -1, -1, -1)  # [2, B, Hkv, P, d]
            k, v = torch.cat([persistent[0], k], 2), torch.cat([persistent[1], v], 2)
            seen = F.pad(seen, (self.persistent.shape[2], 0), value=True)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        dropout = self.dropout if self.training else 0.0
        if seen is not None and q.shape[2] > 1 and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # with a mask torch's own takes twice the time of these products
            scores = torch.where(seen, (self.head_dim**-0.5 * q) @ k.mT, -torch.inf)
            return F.dropout(scores.softmax(-1), dropout) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=is_causal)
