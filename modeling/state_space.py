"""The selective state-space mixer of Mamba (Gu and Dao, arXiv 2312.00752, section 3 and algorithm 2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.selective_scan import causal_conv1d, causal_conv1d_update, selective_scan, selective_scan_update
from memzoo.kernels.selective_scan.mixer import MixerWeights, mixer_step
from memzoo.modeling.untouched import untouched


class SelectiveStateSpace(nn.Module):
    """x [B, T, D] -> [B, T, D] with I = expand D channels, N states a channel.

    [u, z] = W_in x;  u = SiLU(conv(u));  [d, B_t, C_t] = W_x u;  Delta = softplus(W_dt d + b);  A = -exp(A_log)
    s_t = exp(Delta_t A) s_{t-1} + Delta_t B_t u_t;  o_t = C_t s_t + D u_t;  y = W_out (o SiLU(z))

    Its memory is `conv`, the last W - 1 inputs of the convolution [B, I, W - 1], and `ssm`, s [B, I, N] in at least
    float32. Parameters have the names and shapes of transformers' MambaMixer.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        time_step_rank: int | None = None,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        self.sizes = (rank, state_size, state_size)
        self.time_step_range = (time_step_min, time_step_max)
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Mamba's initialisation (arXiv 2312.00752, section 3.6): A = -1..-N, Delta log-uniform in its range."""
        low, high = map(math.log, self.time_step_range)
        step = torch.exp(torch.rand_like(self.dt_proj.bias, dtype=torch.float32) * (high - low) + low).clamp_(min=1e-4)
        init.copy_(self.dt_proj.bias, step + torch.log(-torch.expm1(-step)))  # softplus^-1
        init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        init.zeros_(self.conv1d.bias)
        N = self.A_log.shape[1]
        init.copy_(self.A_log, torch.arange(1, N + 1, dtype=torch.float32).log().expand_as(self.A_log))
        init.ones_(self.D)

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        if state and mask is None and hidden_states.shape[1] == 1:
            y, state = self._step(hidden_states[:, 0], state)
            return y[:, None], state
        u, z = (x.mT for x in self.in_proj(hidden_states).chunk(2, dim=-1))  # [B, I, T], views
        weight = self.conv1d.weight.squeeze(1)
        u, conv = causal_conv1d(u, weight, self.conv1d.bias, state.get("conv"), mask, activation="silu")
        delta, B, C = self.x_proj(u.mT).split(self.sizes, dim=-1)
        y, ssm = selective_scan(
            u,
            F.linear(delta.to(self.dt_proj.weight.dtype), self.dt_proj.weight).mT,
            self._A(),
            B.mT,
            C.mT,
            D=self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=state.get("ssm"),
            mask=mask,
        )
        return self.out_proj(y.mT), {"conv": conv, "ssm": ssm}

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _step(self, hidden_states: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One token [B, D], without an axis of time."""
        weights = self.weights()
        stepped = weights and mixer_step(self, hidden_states, weights, state["conv"], state["ssm"])
        if stepped:
            return stepped[0], {"conv": stepped[1], "ssm": stepped[2]}
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # [B, I]
        u, conv = causal_conv1d_update(state["conv"], u, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        delta, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        delta = F.linear(delta.to(weight.dtype), weight)
        y, ssm = selective_scan_update(state["ssm"], u, delta, self._A(), B, C, self.D, z, bias, True)
        return self.out_proj(y), {"conv": conv, "ssm": ssm}

    def weights(self) -> MixerWeights | None:
        """All weights, or None where they are not all that decides what the layer does."""
        parts = self._modules
        linears = parts["in_proj"], parts["x_proj"], parts["dt_proj"], parts["out_proj"]
        if not (untouched(parts["conv1d"], nn.Conv1d) and all(untouched(layer, nn.Linear) for layer in linears)):
            return None
        into, x_proj, dt_proj, out = (layer._parameters for layer in linears)
        conv, own = parts["conv1d"]._parameters, self._parameters
        return MixerWeights(
            into["weight"],
            into["bias"],
            conv["weight"],
            conv["bias"],
            x_proj["weight"],
            dt_proj["weight"],
            dt_proj["bias"],
            own["A_log"],
            own["D"],
            out["weight"],
            out["bias"],
        )
