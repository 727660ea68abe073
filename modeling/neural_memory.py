"""The neural long-term memory of Titans (arXiv 2501.00663, section 3.1, eq. 8-15) as a layer."""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.neural_memory import MemoryState, neural_memory, neural_memory_read
from memzoo.kernels.neural_memory.gated_norm import gated_norm
from memzoo.kernels.rms_norm import rms_norm
from memzoo.kernels.selective_scan import causal_conv1d
from memzoo.modeling.neural_memory_config import NeuralMemoryConfig


class NeuralMemory(nn.Module):
    """x [B, T, D] -> [B, T, D] through one network per head whose weights are learned while reading.

        q, k, v = conv(W_qkv x), q and k of unit length;   alpha, eta, theta / theta_max = sigmoid(W_g x + b)
        S_t = eta_t S_{t-1} - theta_t grad 1/2 ||f_W(k_t) - v_t||^2;   W_t = (1 - alpha_t) W_{t-1} + S_t
        y = W_o (norm(f_{W_t}(q_t)) sigmoid(W_z x))

    Gradients are taken at the weights at the start of each chunk of `chunk_size` tokens. W_0 is learned.

    Its state is, per layer i of the network, `weights_i`, `momentum_i`, `start_i` [B, H, out, in] in at least float32,
    `position` [B] in the chunk and `conv` [B, 3 M, conv_kernel - 1]. An empty state is the start of a sequence.

    Args:
        width: M of q, k and v, all heads together; None is hidden_size.
        depth: matrices of the network, 1 for a linear memory. expansion: its hidden width in head widths.
        conv_kernel: width of the causal convolution of q, k and v; None for none.
        alpha: first decay per token of the first and the last head, those between in equal ratios: memories of about
            1 / alpha tokens. Decay is towards zero, also of what the first layers of a network have learned: beyond
            1 / alpha tokens it computes another function, so keep it well below 1 / (longest text).
        eta, theta: first momentum, first step. All three gates are learned from there.
            A chunk whose keys agree moves the memory by up to theta chunk_size / (1 - eta) of its error, which should
            not be far above 1 at first.
        theta_max: largest step. To learn a fact that is read once, a token needs theta / (1 - eta) near 1 while the
            others stay far below it: a small theta_max writes every token alike, and each over the one before.
        clip: largest norm of a token's gradient. threshold: squared errors below it cause no step.
        update: "never" reads W_0 (or the weights of a given state), "train" does so in evaluation.
        read_own_write: whether a token reads the memory after its own write or before it.
        detach_every: chunks after which gradients of the past stop; None for never.
        residual: f(x) = x + network(x).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        width: int | None = None,
        depth: int = 2,
        expansion: float = 2.0,
        chunk_size: int = 16,
        conv_kernel: int | None = 4,
        alpha: tuple[float, float] = (1e-6, 1e-5),
        eta: float = 0.9,
        theta: float = 0.01,
        theta_max: float = 1.0,
        clip: float | None = 1.0,
        threshold: float | None = None,
        update: Literal["always", "train", "never"] = "always",
        read_own_write: bool = True,
        detach_every: int | None = None,
        residual: bool = False,
        activation: Literal["silu", "gelu"] = "silu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        memory_dim = width or hidden_size
        if memory_dim % num_heads:
            raise ValueError(f"the memory's width {memory_dim} is not a multiple of its num_heads {num_heads}")
        if depth < 1 or chunk_size < 1:
            raise ValueError(f"depth and chunk_size must be at least 1, not {depth} and {chunk_size}")
        if update not in ("always", "train", "never"):
            raise ValueError(f"update must be 'always', 'train' or 'never', not {update!r}")
        head_dim = memory_dim // num_heads
        widths = [head_dim, *[int(expansion * head_dim)] * (depth - 1), head_dim]
        self.num_heads, self.chunk_size, self.theta_max, self.update = num_heads, chunk_size, theta_max, update
        self.network = {"activation": activation, "residual": residual}
        self.rule = {
            "clip": clip,
            "threshold": threshold,
            "read_own_write": read_own_write,
            "detach_every": detach_every,
        }
        self.first_gates = (alpha, eta, theta)
        self.qkv_proj = nn.Linear(hidden_size, 3 * memory_dim, bias=False)
        self.gate_proj = nn.Linear(hidden_size, 3 * num_heads)  # alpha, eta, theta
        self.conv1d = None
        if conv_kernel is not None:
            self.conv1d = nn.Conv1d(3 * memory_dim, 3 * memory_dim, conv_kernel, groups=3 * memory_dim, bias=False)
        self.initial_weights = nn.ParameterList(torch.empty(num_heads, b, a) for a, b in pairwise(widths))
        self.norm = nn.RMSNorm(head_dim, norm_eps)
        self.z_proj = nn.Linear(hidden_size, memory_dim, bias=False)
        self.o_proj = nn.Linear(memory_dim, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: NeuralMemoryConfig) -> "NeuralMemory":
        """The neural memory of a layer of a family that has these fields."""
        return cls(
            config.hidden_size,
            config.memory_num_heads,
            width=config.memory_dim,
            depth=config.memory_depth,
            expansion=config.memory_expansion,
            chunk_size=config.memory_chunk_size,
            conv_kernel=config.memory_conv_kernel,
            alpha=tuple(config.memory_alpha),
            eta=config.memory_eta,
            theta=config.memory_theta,
            theta_max=config.memory_theta_max,
            clip=config.memory_clip,
            threshold=config.memory_threshold,
            update=config.memory_update,
            read_own_write=config.memory_read_own_write,
            detach_every=config.memory_detach_every,
            residual=config.memory_residual,
            norm_eps=config.rms_norm_eps,
        )

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Small gates around their first values, everything else normal with `std`.

        The matrices of W_0 have unit gain, but for the last, which is zero: an unwritten memory reads zero, and what
        is written does not have to be told from noise.
        """
        for module in (self.qkv_proj, self.z_proj, self.o_proj, self.gate_proj):
            init.normal_(module.weight, std=std)
        (first, last), eta, theta = self.first_gates
        alpha = torch.logspace(math.log10(first), math.log10(last), self.num_heads)
        heads = torch.ones(self.num_heads)
        bias = torch.cat([alpha, eta * heads, theta / self.theta_max * heads]).logit()
        init.copy_(self.gate_proj.bias, bias)
        if self.conv1d is not None:
            init.normal_(self.conv1d.weight, std=self.conv1d.weight.shape[-1] ** -0.5)
        *before, last = self.initial_weights
        for weight in before:
            init.normal_(weight, std=weight.shape[-1] ** -0.5)
        init.zeros_(last)
        init.ones_(self.norm.weight)

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        found, new_state = self.learn(hidden_states, state, mask)
        return self.output(found, hidden_states), new_state

    def learn(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the memory reads for each token while it is written, [B, T, H, d], and the new state."""
        q, k, v, conv = self._project(hidden_states, state, mask)
        new_state = {**state, **conv}
        memory = self.memory(state, q)
        if self.updates:
            y, memory = neural_memory(
                q,
                k,
                v,
                *self.gates(hidden_states),
                memory.weights,
                memory.momentum,
                self.chunk_size,
                mask,
                start=memory.start,
                position=memory.position,
                normalize=True,
                **self.network,
                **self.rule,
            )
            for name in ("weights", "momentum", "start"):
                new_state |= {f"{name}_{i}": x for i, x in enumerate(getattr(memory, name))}
            new_state["position"] = memory.position
        else:
            y = neural_memory_read(F.normalize(q, dim=-1), memory.weights, **self.network).to(v.dtype)
        return y.transpose(1, 2), new_state

    def output(self, found: Tensor, hidden_states: Tensor) -> Tensor:
        """The layer's output from what `learn` found for its input: it depends on no other token."""
        gate = self.z_proj(hidden_states)
        return self.o_proj(gated_norm(found, self.norm.weight, gate, self.norm.eps))

    def unit(self, queries: Tensor) -> Tensor:
        """Projected queries [B, T, M] as `read` takes them: [B, T, H, d], of unit length, at least float32."""
        q = queries.unflatten(-1, (self.num_heads, -1))
        return F.normalize(q.to(torch.promote_types(q.dtype, torch.float32)), dim=-1)

    def read(self, queries: Tensor, weights: list[Tensor]) -> Tensor:
        """What a memory with these weights holds for unit queries [B, T, H, d]: [B, T, M]. No write."""
        with torch.autocast(queries.device.type, enabled=False):
            y = neural_memory_read(queries.transpose(1, 2), weights, **self.network).transpose(1, 2)
            return rms_norm(y, self.norm.weight.to(y.dtype), self.norm.eps).flatten(2)

    @property
    def updates(self) -> bool:
        """Whether reading a text changes the memory."""
        return self.update == "always" or (self.update == "train" and self.training)

    def project(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k (of unit length, at least float32) and v, [B, H, T, d], and the convolution's new state."""
        q, k, v, conv = self._project(hidden_states, state, mask)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, conv

    def _project(self, hidden_states, state, mask):
        """As project, but of any length."""
        qkv, conv = self.qkv_proj(hidden_states), {}
        dtype = qkv.dtype
        qkv = qkv.to(torch.promote_types(dtype, torch.float32))  # once, not for every step that computes in it
        if self.conv1d is not None:
            kernel = self.conv1d.weight.squeeze(1)
            qkv, tail = causal_conv1d(qkv.mT, kernel, None, state.get("conv"), mask, activation="silu")
            qkv, conv["conv"] = qkv.mT, tail.to(dtype)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return q, k, v, conv

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, eta, theta [B, H, T]."""
        gates = self.gate_proj(hidden_states)
        alpha, eta, theta = gates.to(torch.promote_types(gates.dtype, torch.float32)).sigmoid().mT.chunk(3, dim=1)
        return alpha, eta, self.theta_max * theta

    def memory(self, state: dict[str, Tensor], q: Tensor) -> MemoryState:
        """The memory of a state for queries q; W_0 at the start of a sequence."""
        depth = len(self.initial_weights)
        if "position" not in state:
            weights = [w.to(q.dtype).expand(q.shape[0], *w.shape) for w in self.initial_weights]
            return MemoryState(weights, None, None, None)
        layers = ([state[f"{name}_{i}"] for i in range(depth)] for name in ("weights", "momentum", "start"))
        position = state["position"]
        if position.device.type == "cpu" and not torch.compiler.is_compiling() and not position.any():
            return MemoryState(*list(layers)[:2], None, None)  # chunks start here: no token has to be moved
        return MemoryState(*layers, position)
