"""What `memzoo` exports, and what importing it costs."""

import json
import sys
from pathlib import Path

import pytest

import memzoo

PUBLIC = {
    "__version__",
    "DualMemoryConfig",
    "DualMemoryForCausalLM",
    "DualMemoryForSequenceClassification",
    "DualMemoryModel",
    "MaruConfig",
    "MaruForCausalLM",
    "MaruForSequenceClassification",
    "MaruModel",
    "MaruTokenizer",
    "MemoryBankTransformerConfig",
    "MemoryBankTransformerForCausalLM",
    "MemoryBankTransformerForSequenceClassification",
    "MemoryBankTransformerModel",
    "MemoryCache",
    "MemoryConfig",
    "MemoryGenerationMixin",
    "MemoryModel",
    "NeuralMemoryTransformerConfig",
    "NeuralMemoryTransformerForCausalLM",
    "NeuralMemoryTransformerForSequenceClassification",
    "NeuralMemoryTransformerModel",
    "TitanMacConfig",
    "TitanMacForCausalLM",
    "TitanMacForSequenceClassification",
    "TitanMacModel",
    "memory_param_groups",
    "parameter_breakdown",
}


def test_public_names():
    assert set(memzoo.__all__) == PUBLIC
    assert len(memzoo.__all__) == len(PUBLIC)
    assert set(dir(memzoo)) >= PUBLIC
    for name in PUBLIC - {"__version__"}:
        assert getattr(memzoo, name).__module__.startswith("memzoo.")
    with pytest.raises(AttributeError, match="no attribute 'Maru'"):
        _ = memzoo.Maru


def test_import_is_light(run, tmp_path):
    code = "import memzoo, sys, json; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run(sys.executable, "-P", "-c", code, cwd=tmp_path)))
    heavy = {"numba", "matplotlib", "datasets", "peft", "pandas", "memzoo.training", "memzoo.adapters"}
    assert not loaded & heavy
    # transformers itself imports triton where it is installed; memzoo's own kernels must not
    assert not [name for name in loaded if name.startswith("memzoo.") and name.endswith(".triton")]


def test_types_are_shipped():
    assert (Path(memzoo.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("first", ["import memzoo, peft", "import peft, memzoo", "import memzoo.adapters.layer"])
def test_peft_knows_the_method_whatever_is_imported_first(first, run, tmp_path):
    code = f"{first}; import peft; print(peft.PEFT_TYPE_TO_TUNER_MAPPING['MEMZOO'].__name__)"
    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path).strip() == "MemoryModel"
