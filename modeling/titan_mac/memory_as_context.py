"""Memory as context, the MAC arrangement of Titans (arXiv 2501.00663, section 4.1, eq. 21-25), token by token."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import rotate_half

from memzoo.modeling.attention import CausalSelfAttention
from memzoo.modeling.neural_memory import NeuralMemory
from memzoo.modeling.norm import RMSNorm, narrow
from memzoo.modeling.segments import Segments
from memzoo.modeling.titan_mac.configuration_titan_mac import TitanMacConfig

KeysAndValues = tuple[Tensor, Tensor]


class MemoryAsContext(CausalSelfAttention):
    """x [B, T, D] -> [B, T, D], a segment of S tokens after the other; M is the memory before the segment:

        h_j = W_p M(W_Q x_j);   y_i = Attention(x_i; [persistent; h_j and x_j of its own segment, j <= i])
        u_i = norm(x_i + y_i);   M_i = M_{i-1} written with u_i;   o_i = y_i * sigmoid(M_i(u_i))

    The memory reads y with its residual (the paper's section 4.4), so that what W_Q asks for and what was written are
    of one space from the start. With `memory_num_tokens` the segment has that many memory tokens instead,
    h_m = W_p M(q_m) of learned queries, which every token of the segment sees. Segments count each row's own real
    tokens.

    Its state is the memory's, and of the unfinished segment: `place` [B] int64, its tokens; their `keys` and `values`
    [B, S - 1, n, Hkv, d] (n = 2 with those of h), zero beyond; `first_i` [B, H, out, in], the weights of M.
    """

    def __init__(self, config: TitanMacConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            window=config.memory_segment_size,
            num_persistent_tokens=config.num_persistent_tokens,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
        )
        self.segment_size = config.memory_segment_size
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.memory = NeuralMemory.from_config(config)
        self.queries = None
        if config.memory_num_tokens is None:
            self.recall_proj = nn.Linear(config.hidden_size, config.memory_dim, bias=False)
        else:
            self.queries = nn.Parameter(torch.empty(1, config.memory_num_tokens, config.memory_dim))
        self.token_proj = nn.Linear(config.memory_dim, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.queries is not None:
            init.normal_(self.queries)  # only directions count, another one for every token and head

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        B, T, _ = hidden_states.shape
        place = state["place"] if state else hidden_states.new_zeros(B, dtype=torch.int64)
        cut = Segments(place, T, mask, self.segment_size)
        q, k, v = (
            proj(hidden_states).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self._rotary(place.new_zeros(1), self.segment_size, q.dtype)  # [1, S, d]
        angles = [x[0, cut.places][:, :, None] for x in (cos, sin)]  # [B, T, 1, d]
        tokens = [hidden_states, _rotate(q, *angles), _rotate(k, *angles), v]
        if self.queries is None:
            tokens += [self.memory.unit(self.recall_proj(hidden_states)), *angles]

        weights, keys, values, inputs, found, outputs = self._first(state, q), [], [], [], [], []
        memory_tokens = T if self.queries is None else len(cut.lengths) * self.queries.shape[1]
        project = self._projection() if memory_tokens > self.token_proj.in_features else self._project
        past = [cut.earlier(state[name]) for name in ("keys", "values")] if cut.past else None
        memory_state = state
        for i, (x_i, q_i, k_i, v_i, *recall) in enumerate(zip(*map(cut.split, tokens))):
            context = None
            if self.queries is None:
                queries, *angles = recall
                k_h, v_h = project(self.memory.read(queries, weights))
                k_i, v_i = torch.stack([k_i, _rotate(k_h, *angles)], 2), torch.stack([v_i, v_h], 2)
            else:
                asked = self.memory.unit(self.queries).expand(B, -1, -1, -1)
                context = project(self.memory.read(asked, weights))
                k_i, v_i = k_i[:, :, None], v_i[:, :, None]  # [B, L, n, Hkv, d]
            keys.append(k_i)
            values.append(v_i)
            if past is not None and i == 0:
                k_i, v_i = (torch.cat([old.to(x.dtype), x], 1) for old, x in zip(past, (k_i, v_i)))
            missing = cut.missing if i == 0 else None
            y = self.attend(q_i, k_i.flatten(1, 2), v_i.flatten(1, 2), missing, k_i.shape[2], context)
            outputs.append(self.o_proj(y.flatten(2)))
            inputs.append(narrow(self.norm((x_i + outputs[-1]).to(self.norm.weight.dtype))))
            read, memory_state = self.memory.learn(inputs[-1], memory_state, cut.masks[i])
            found.append(read)
            if cut.completes[i] and "weights_0" in memory_state:
                weights = [cut.choose(i, memory_state[f"weights_{l}"], x) for l, x in enumerate(weights)]
            if cut.completes[i] and self._truncates(i):
                memory_state = {name: x.detach() for name, x in memory_state.items()}
                weights = [x.detach() for x in weights]

        new_state = {**memory_state, "place": cut.place}
        for name, pieces in (("keys", keys), ("values", values)):
            new_state[name] = cut.unfinished(state.get(name), pieces)
        if "weights_0" in memory_state:
            new_state |= {f"first_{l}": x for l, x in enumerate(weights)}
        gate = self.memory.output(cut.join(found), cut.join(inputs))
        return cut.join(outputs) * gate.sigmoid(), new_state

    def _truncates(self, i: int) -> bool:
        """Whether gradients stop behind segment i of a call: after every `detach_every` chunks, at a segment's end."""
        every = self.memory.rule["detach_every"]
        if every is None:
            return False
        tokens = every * self.memory.chunk_size
        return (i + 1) * self.segment_size // tokens > i * self.segment_size // tokens

    def _first(self, state: dict[str, Tensor], like: Tensor) -> list[Tensor]:
        """The memory's weights before the unfinished segment."""
        if "first_0" in state:
            return [state[f"first_{l}"] for l in range(len(self.memory.initial_weights))]
        wide = torch.promote_types(like.dtype, torch.float32)
        return self.memory.memory({}, like.new_zeros(like.shape[0], dtype=wide)).weights

    def _project(self, h: Tensor) -> KeysAndValues:
        """Keys and values [B, L, Hkv, d] of what the memory holds, h [B, L, M]."""
        h = self.token_proj(h.to(self.token_proj.weight.dtype))
        k, v = (proj(h).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return k, v

    def _projection(self) -> Callable[[Tensor], KeysAndValues]:
        """The same for many tokens: `_project` is linear, so what it makes of the unit vectors is its matrix, and a
        segment needs one product instead of three."""
        k, v = self._project(torch.eye(self.token_proj.in_features, device=self.token_proj.weight.device))
        matrix = torch.stack([k, v], 1).flatten(1)  # [M, 2 Hkv d]

        def project(h: Tensor) -> KeysAndValues:
            k, v = torch.matmul(h.to(matrix.dtype), matrix).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
            return k, v

        return project


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, L, h, d], cos and sin [B, L, 1, d]."""
    return x * cos + rotate_half(x) * sin
