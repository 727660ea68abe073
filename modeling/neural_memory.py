"""The neural long-term memory of Titans (arXiv 2501.00663, section 3.1, eq. 8-15) as a layer."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.neural_memory import MemoryState, neural_memory, neural_memory_read
from memzoo.kernels.selective_scan import causal_conv1d

ALPHA = (1e-3, 1e-2)  # first decay of the first and of the last head: memories of about 1000 to 100 tokens
ETA = 0.9  # first momentum


class NeuralMemory(nn.Module):
    """x [B, T, D] -> [B, T, D] through one network per head whose weights are learned while reading.

        q, k, v = conv(W_qkv x), q and k of unit length;   alpha, eta, theta / theta_max = sigmoid(W_g x + b)
        S_t = eta_t S_{t-1} - theta_t grad 1/2 ||f_W(k_t) - v_t||^2;   W_t = (1 - alpha_t) W_{t-1} + S_t
        y = W_o (norm(f_{W_t}(q_t)) sigmoid(W_z x))

    Gradients are taken at the weights at the start of each chunk of `chunk_size` tokens. W_0 is learned.

    Its state is, per layer i of the network, `weights_i`, `momentum_i`, `start_i` [B, H, out, in] in at least float32,
    `position` [B] in the chunk and `conv` [B, 3 D, conv_kernel - 1]. An empty state is the start of a sequence.

    Args:
        depth: matrices of the network, 1 for a linear memory. expansion: its hidden width in head widths.
        conv_kernel: width of the causal convolution of q, k and v; None for none.
        theta_max: largest step. A chunk whose keys agree moves the memory by up to theta_max chunk_size / (1 - eta)
            of its error, which should not be much above 1.
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
        depth: int = 2,
        expansion: float = 2.0,
        chunk_size: int = 16,
        conv_kernel: int | None = 4,
        theta_max: float = 0.01,
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
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if depth < 1 or chunk_size < 1:
            raise ValueError(f"depth and chunk_size must be at least 1, not {depth} and {chunk_size}")
        if update not in ("always", "train", "never"):
            raise ValueError(f"update must be 'always', 'train' or 'never', not {update!r}")
        width = hidden_size // num_heads
        widths = [width, *[int(expansion * width)] * (depth - 1), width]
        self.num_heads, self.chunk_size, self.theta_max, self.update = num_heads, chunk_size, theta_max, update
        self.network = {"activation": activation, "residual": residual}
        self.rule = {
            "clip": clip,
            "threshold": threshold,
            "read_own_write": read_own_write,
            "detach_every": detach_every,
        }
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, 3 * num_heads)  # alpha, eta, theta
        self.conv1d = None
        if conv_kernel is not None:
            self.conv1d = nn.Conv1d(3 * hidden_size, 3 * hidden_size, conv_kernel, groups=3 * hidden_size, bias=False)
        self.initial_weights = nn.ParameterList(torch.empty(num_heads, b, a) for a, b in pairwise(widths))
        self.norm = nn.RMSNorm(width, norm_eps)
        self.z_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Small gates around their first values, W_0 with unit gain, everything else normal with `std`."""
        for module in (self.qkv_proj, self.z_proj, self.o_proj, self.gate_proj):
            init.normal_(module.weight, std=std)
        heads = torch.ones(self.num_heads)
        alpha = torch.logspace(*torch.tensor(ALPHA).log10().tolist(), self.num_heads)
        init.copy_(self.gate_proj.bias, torch.cat([alpha.logit(), (ETA * heads).logit(), 0 * heads]))
        if self.conv1d is not None:
            init.normal_(self.conv1d.weight, std=self.conv1d.weight.shape[-1] ** -0.5)
        for weight in self.initial_weights:
            init.normal_(weight, std=weight.shape[-1] ** -0.5)
        init.ones_(self.norm.weight)

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        B, T, _ = hidden_states.shape
        qkv, new_state = self.qkv_proj(hidden_states), dict(state)
        if self.conv1d is not None:
            kernel = self.conv1d.weight.squeeze(1)
            qkv, new_state["conv"] = causal_conv1d(qkv.mT, kernel, None, state.get("conv"), mask, activation="silu")
            qkv = qkv.mT
        q, k, v = qkv.view(B, T, 3 * self.num_heads, -1).transpose(1, 2).chunk(3, dim=1)  # [B, H, T, d]
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(wide), dim=-1)
        memory = self._memory(state, B, wide)
        if self.update == "always" or (self.update == "train" and self.training):
            gates = self.gate_proj(hidden_states).to(wide).sigmoid().mT  # [B, 3 H, T]
            alpha, eta, theta = gates.chunk(3, dim=1)
            y, memory = neural_memory(
                q,
                F.normalize(k.to(wide), dim=-1),
                v,
                alpha,
                eta,
                self.theta_max * theta,
                memory.weights,
                memory.momentum,
                self.chunk_size,
                mask,
                start=memory.start,
                position=memory.position,
                **self.network,
                **self.rule,
            )
            for name in ("weights", "momentum", "start"):
                new_state |= {f"{name}_{i}": x for i, x in enumerate(getattr(memory, name))}
            new_state["position"] = memory.position
        else:
            y = neural_memory_read(q, memory.weights, **self.network).to(v.dtype)
        y = self.norm(y.transpose(1, 2)).flatten(2)  # [B, T, D]
        return self.o_proj(y * self.z_proj(hidden_states).sigmoid()), new_state

    def _memory(self, state: dict[str, Tensor], B: int, dtype: torch.dtype) -> MemoryState:
        depth = len(self.initial_weights)
        if "position" not in state:
            return MemoryState([w.to(dtype).expand(B, *w.shape) for w in self.initial_weights], None, None, None)
        layers = ([state[f"{name}_{i}"] for i in range(depth)] for name in ("weights", "momentum", "start"))
        return MemoryState(*layers, state["position"])
