"""The formulas of docs/scaling.md against models that are built, and against what two processes hold and send."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from memzoo import MemoryConfig
from memzoo.training.config import load_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rank", [None, 512])
def test_the_plan_counts_the_parameters_of_the_adapter(scaling, rank):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    bank = {"bank_type": "reduced", "bank_rank": rank} if rank else {}
    bank |= {"num_memory_tokens": 1 << 20, "num_chapters": 1024, "top_k_chapters": 8, "num_heads": 32}
    bank |= {"placement": "every_n", "placement_k": 8, "sharing": "shared"}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32000, **sizes))
        model = get_peft_model(base, MemoryConfig(task_type="CAUSAL_LM", **bank))
    trained, total = model.get_nb_trainable_parameters()
    work = scaling.bank_workload(rank)
    assert (work.trained, work.frozen) == pytest.approx((trained, total - trained), rel=1e-3)
    whole = [p.numel() for name, p in model.named_parameters() if "memzoo_banks" in name]
    assert whole == [work.whole]
    assert not any(
        "memzoo_banks" in name for name, _ in base.model.layers.named_parameters()
    )  # it is in the root group


def test_base_small_has_as_many_parameters(scaling):
    config = load_config(str(ROOT / "training" / "configs" / "base_small.yaml"))
    section = {"vocab_size": config.tokenizer.vocab_size, **config.model}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[section.pop("model_type")](**section))
    assert scaling.base_workload().trained == pytest.approx(model.num_parameters(), rel=5e-3)


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("reads", [True, False])
def test_a_layer_keeps_as_many_activations(scaling, monkeypatch, ratio, reads):
    width, tokens = scaling.SIZES["hidden_size"], 512
    monkeypatch.setitem(scaling.SIZES, "intermediate_size", ratio * width)
    fields = {} if reads else {"memory_placement": "none"}
    kept = scaling.kept_bytes(3, **fields) - scaling.kept_bytes(2, **fields)
    sizes = {"mlp_ratio": ratio, "hidden_size": width, "tokens": tokens, "checkpointing": False}
    works = [scaling.Workload(trained=1, layers=n, read_layers=n * reads, **sizes) for n in (2, 3)]
    assert kept == pytest.approx(scaling.activation_bytes(works[1]) - scaling.activation_bytes(works[0]), rel=0.01)


def test_the_tables_of_the_page_are_those_of_the_script(scaling):
    base, hardware = scaling.base_workload(), scaling.Hardware()
    ideal = sum(scaling.compute_seconds(base, hardware))
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|$", PAGE, re.M)
    assert [int(row[0]) for row in rows] == [1, 8, 16, 512]
    for gpus, *cells in rows:
        for method, (held, sent, efficiency) in (("ddp", cells[:3]), ("fsdp2", cells[3:])):
            found = scaling.state_bytes(base, int(gpus), method) + scaling.activation_bytes(base)
            assert float(held) == pytest.approx(found / 1e9, abs=0.051)
            assert float(sent) == pytest.approx(
                sum(scaling.communication_bytes(base, int(gpus), method)) / 1e9, abs=0.051
            )
            assert float(efficiency) == pytest.approx(
                100 * ideal / scaling.step_seconds(base, int(gpus), method, hardware), abs=1
            )
    for column, rank in enumerate((None, 512)):
        work = scaling.bank_workload(rank)
        line = re.search(r"^\| held on 1 / 8 / 64 / 512 GPUs \|(.*)\|(.*)\|$", PAGE, re.M).group(column + 1)
        held = [scaling.state_bytes(work, n, "fsdp2") + scaling.activation_bytes(work) for n in (1, 8, 64, 512)]
        assert [float(x) for x in re.findall(r"\d+", line)] == pytest.approx([x / 1e9 for x in held], abs=0.51)
        step = re.search(r"^\| a step \| ([\d.]+) s \| ([\d.]+) s \|$", PAGE, re.M).group(column + 1)
        assert float(step) == pytest.approx(scaling.step_seconds(work, 8, "fsdp2", hardware), abs=0.006)


@pytest.mark.slow
def test_two_processes_hold_and_send_what_the_formulas_say():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, str(SCRIPT), "--measure"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = re.findall(
        r"([\d.]+) (?:MB held|MB a step|bytes a token and channel in bf16), formula ([\d.]+)", done.stdout
    )
    assert len(pairs) == 7
    for measured, formula in pairs:
        assert float(measured) == pytest.approx(float(formula), rel=0.03)
