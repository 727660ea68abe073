"""The table that drives the ten laws: one row per family and option. A new family adds rows, nothing else."""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import memzoo  # noqa: F401 (registers the families)


class Row(NamedTuple):
    model_type: str
    fields: dict[str, Any]
    constant_state: bool = True  # False for options with full attention, whose keys and values grow

    def build(self, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode, its weights large enough that every part matters."""
        common = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
        config = AutoConfig.for_model(self.model_type, **{**common, **self.fields, **overrides})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


_MARU = {"memory_num_banks": 3, "memory_num_slots": 5, "memory_dim": 6, "memory_router_hidden_size": 4}
_LIMITS = {"memory_decay": 0.9, "memory_slot_norm_cap": 0.5}
_ROUTING = {"memory_top_k": 1, "memory_shared_bank": True, "memory_router_temperature": 0.5}

TABLE = {
    "maru-parallel": Row("maru", _MARU),
    "maru-parallel-limits": Row("maru", {**_MARU, **_LIMITS, "cell_size": 10, "use_bias": True}),
    "maru-parallel-routing": Row("maru", {**_MARU, **_ROUTING, "tie_word_embeddings": True}),
    "maru-parallel-no-memory": Row("maru", {**_MARU, "memory_num_banks": 0, "embedding_size": 7}),
    "maru-sequential": Row("maru", {**_MARU, "recurrence": "sequential"}),
    "maru-sequential-limits": Row("maru", {**_MARU, **_LIMITS, "recurrence": "sequential", "cell_size": 10}),
    "maru-sequential-routing": Row("maru", {**_MARU, **_ROUTING, "recurrence": "sequential"}),
    "maru-sequential-no-memory": Row("maru", {**_MARU, "recurrence": "sequential", "memory_num_banks": 0}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", TABLE.values(), ids=TABLE.keys())


@pytest.fixture(scope="session")
def table() -> dict[str, Row]:
    return TABLE


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, 37] tokens: several chunks of every kernel and a remainder; no pads."""
    return torch.randint(3, 61, (3, 37), generator=torch.Generator().manual_seed(1))
