"""Models with their code beside them load, and compute the same, where memzoo is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import memzoo
from memzoo import MaruTokenizer
from memzoo.hub_cards.bundle import bundle, flat_name, flatten

LOAD = """
import json, sys
missing = json.loads(sys.argv[3])
for name in missing:
    sys.modules[name] = None  # as if it were not installed
bundled = "memzoo" in missing
if not bundled:
    import memzoo
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.arange(3, 40)[None]
logits = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=bundled).eval()
    logits[folder] = model(ids).logits
    model.generate(ids, max_new_tokens=2, do_sample=False)
tokenizer = AutoTokenizer.from_pretrained(next(iter(logits)), trust_remote_code=bundled)
assert tokenizer.decode(tokenizer("čau")["input_ids"], skip_special_tokens=True) == "čau"
torch.save(logits, sys.argv[2])
"""
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 264}


@pytest.mark.parametrize("missing", [[], ["numba", "triton"]], ids=["with numba", "without"])
def test_every_family_loads_without_memzoo(tmp_path, missing):
    folders = []
    for model_type in memzoo._FAMILIES:
        fields = {"num_attention_heads": 2} if hasattr(AutoConfig.for_model(model_type), "num_attention_heads") else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY, **fields)).eval()
        folder = tmp_path / model_type
        model.save_pretrained(folder)
        MaruTokenizer().save_pretrained(folder)
        assert bundle(folder)
        folders.append(str(folder))
    expected = logits_of(folders, missing, tmp_path / "package")
    for folder, logits in logits_of(folders, ["memzoo", *missing], tmp_path / "bundled").items():
        assert torch.equal(logits, expected[folder])


def logits_of(folders, missing, scratch):
    """By folder, from a process of its own in which the modules in `missing` cannot be imported."""
    scratch.mkdir()
    arguments = [json.dumps(folders), str(scratch / "logits.pt"), json.dumps(missing)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, *arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(scratch / "logits.pt", weights_only=True)


@pytest.mark.parametrize("family", memzoo._FAMILIES)
def test_flat_files_import_nothing_of_memzoo_and_are_complete(family):
    files = flatten([f"memzoo.modeling.{family}.modeling_{family}"])
    assert {f"modeling_{family}", f"configuration_{family}", "cache"} <= files.keys()
    for name, source in files.items():
        assert "import_module(" not in source, f"{name} imports by a name that is not rewritten"
        for line in source.splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and len(words) > 1:
                assert not words[1].startswith("memzoo"), f"{name}: {line}"
                if words[1].startswith("."):
                    assert words[1][1:] in files, f"{name}: {line}"


def test_the_fast_forms_come_along():
    assert {"kernel_selective_scan", "kernel_selective_scan_triton"} <= flatten(
        ["memzoo.modeling.maru.modeling_maru"]
    ).keys()
    dual = flatten(["memzoo.modeling.dual_memory.modeling_dual_memory"])
    bank = flatten(["memzoo.modeling.memory_bank_transformer.modeling_memory_bank_transformer"])
    assert "kernel_slot_memory_triton" in dual and "kernel_bank_attention_triton" in bank


def test_names_are_flat_and_do_not_collide():
    assert flat_name("memzoo.modeling.neural_memory") == "neural_memory"
    assert flat_name("memzoo.kernels.neural_memory") == "kernel_neural_memory"
    assert flat_name("memzoo.kernels.neural_memory.step") == "kernel_neural_memory_step"


def test_other_models_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        bundle(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' is not a memzoo family"):
        bundle(tmp_path)
