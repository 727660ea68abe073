"""Models as ONNX graphs with explicit state: `step.onnx` reads one token, `prefill.onnx` any number of them.

Inputs of both are `input_ids` [1, 1] or [1, T] and one tensor per state; outputs are `logits` and the new states, as
`new.<state>`. `state.json` tells their shapes and dtypes; `state.safetensors` is the memory before the first token.
The prefill is the step in an ONNX `Scan`: it computes the same, and its graph does not grow with T.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers import PreTrainedModel

from memzoo.modeling.cache import MemoryCache

TOLERANCE = 1e-4  # of a logit, against torch


class RecurrentStep(nn.Module):
    """(input_ids [B, 1], *states) -> (logits [B, 1, V], *new states), for models whose memory has constant size.

    It is what torch.export takes: `torch.export.export(RecurrentStep(model), step.example())`.

    Raises:
        ValueError: the model's memory grows with the text (full attention).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()
        first, second = self._states(1), self._states(200)
        grown = [name for name, state in second.items() if state.shape != first[name].shape]
        if grown:
            raise ValueError(
                f"the state {grown[0]} grows with the text ({list(first[grown[0]].shape)} after one token, "
                f"{list(second[grown[0]].shape)} after 200): only models with a memory of constant size have a step. "
                "Use sliding windows instead of full attention"
            )
        self.names = list(first)
        self.before = self._states(1, real=0)  # a pad leaves a memory as it is

    @torch.no_grad()
    def _states(self, tokens: int, real: int = 1) -> dict[str, Tensor]:
        cache = MemoryCache(self.model.config)
        mask = torch.full((1, tokens), real)
        self.model(torch.zeros(1, tokens, dtype=torch.int64), attention_mask=mask, past_key_values=cache)
        return {name: state.clone() for name, state in cache.states.items()}

    def example(self, tokens: int = 1) -> tuple[Tensor, ...]:
        """Inputs to trace with."""
        return torch.zeros(1, tokens, dtype=torch.int64), *self._states(1).values()

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache = MemoryCache(self.model.config)
        layers: dict[int, dict[str, Tensor]] = {}
        for name, state in zip(self.names, states):
            layer, own = name.split(".", 1)
            layers.setdefault(int(layer), {})[own] = state
        for layer_idx, own_states in layers.items():
            cache.write(layer_idx, own_states, 1)
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, *(cache.states[name] for name in self.names)


class _Prefill(nn.Module):
    def __init__(self, step: RecurrentStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        def one(states: list[Tensor], ids: Tensor) -> tuple[list[Tensor], Tensor]:
            logits, *new = self.step(ids[:, None], *states)
            return [state.clone() for state in new], logits[:, 0].clone()  # a scan's outputs may not alias its inputs

        states, logits = scan(one, list(states), input_ids, dim=1)
        return logits, *states


def export_onnx(model: PreTrainedModel, folder: str | Path) -> dict[str, float]:
    """Write `step.onnx`, `prefill.onnx`, `state.json` and `state.safetensors`, checked in onnxruntime against torch.

    Returns:
        The largest difference of a logit from torch, for "step" and "prefill".

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing: `pip install 'memzoo[onnx]'`.
        ValueError: the model's memory grows with the text, or the graphs differ from torch by more than 1e-4.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed; pip install 'memzoo[onnx]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step = RecurrentStep(model)
    names: dict[str, Any] = {
        "input_names": ["input_ids", *step.names],
        "output_names": ["logits", *(f"new.{n}" for n in step.names)],
    }
    length = torch.export.Dim("length", min=2, max=1 << 20)
    graphs: dict[str, tuple[nn.Module, int, Any]] = {
        "step": (step, 1, None),
        "prefill": (_Prefill(step), 3, ({1: length}, tuple({} for _ in step.names))),
    }
    differences = {}
    ids = torch.randint(0, model.config.vocab_size, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(ids, use_cache=True).logits
        for name, (module, tokens, shapes) in graphs.items():
            program = torch.onnx.export(
                module.eval(), step.example(tokens), dynamo=True, verbose=False, dynamic_shapes=shapes, **names
            )
            assert program is not None
            program.save(folder / f"{name}.onnx")
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            logits = _run(session, step, ids, 1 if name == "step" else 35)
            differences[name] = float((logits - expected).abs().max())
            if not differences[name] < TOLERANCE:
                raise ValueError(
                    f"{name}.onnx differs from torch by {differences[name]:.2g} in a logit: do not use it"
                )
    described = {name: {"shape": list(s.shape), "dtype": str(s.dtype)[6:]} for name, s in step.before.items()}
    (folder / "state.json").write_text(json.dumps(described, indent=2) + "\n")
    save_file(step.before, folder / "state.safetensors")
    return differences


def _run(session: Any, step: RecurrentStep, ids: Tensor, tokens: int) -> Tensor:
    """The logits of a text, read `tokens` at a time."""
    states = {name: state.numpy() for name, state in step.before.items()}
    parts = []
    for piece in ids.split(tokens, 1):
        logits, *new = session.run(None, {"input_ids": piece.numpy(), **states})
        states = dict(zip(step.names, new))
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, 1)
