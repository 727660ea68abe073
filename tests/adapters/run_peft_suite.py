"""Run PEFT's own decoder and custom-model tests, unchanged, on MemoryConfig.

    python tests/adapters/run_peft_suite.py [-k EXPRESSION]

The tests come from the source distribution of the very PEFT version that is installed; pip fetches it once into a
cache folder, PEFT_SUITE_DIR. Only the tables of models and configurations are exchanged: tiny random models in
place of those on the Hub, and memories in place of PEFT's methods. One line a file: passed, failed,
skipped, and the names that failed; exit status 1 if any failed but those of merging, which a memory refuses.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

CACHE = Path(os.environ.get("PEFT_SUITE_DIR") or Path(tempfile.gettempdir()) / "peft_suite")
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "mistral": MistralConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=4),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=4, sliding_window=32),
    "olmo2": Olmo2Config(**TINY),
    "phi3": Phi3Config(**TINY),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64, n_positions=128, eos_token_id=2, bos_token_id=1),
}

DECODER_CASES = """
from pathlib import Path

from memzoo import MemoryConfig

MODELS = sorted(str(path) for path in Path({models!r}).iterdir())
PEFT_DECODER_MODELS_TO_TEST = MODELS
SMALL_GRID_MODELS = MODELS[:3]
SMALL = dict(task_type="CAUSAL_LM", target_modules=None, num_memory_tokens=8, num_heads=2)
ALL_CONFIGS = [
    (MemoryConfig, SMALL),
    (MemoryConfig, SMALL | dict(block_variant="B", sharing="shared")),
    (MemoryConfig, SMALL | dict(sharing="group", group_size=1, bank_type="reduced", bank_rank=4)),
    (MemoryConfig, SMALL | dict(num_chapters=4, top_k_chapters=2)),
    (MemoryConfig, SMALL | dict(memory_type="neural")),
]


"""

CUSTOM_CASES = """
from memzoo import MemoryConfig

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm0 = nn.LayerNorm(20)
        self.mlp = nn.Linear(20, 20)

    def forward(self, X):
        return X + self.mlp(self.norm0(X))

class ResidualMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.layers = nn.ModuleList([Residual(), Residual()])
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        X = self.lin0(X.to(self.dtype) / 10)
        for layer in self.layers:
            X = layer(X)
        return 30 * self.sm(self.lin1(X))

theirs = MockTransformerWrapper.from_pretrained

def from_pretrained(model_id, dtype=None):
    if model_id != "ResidualMLP":
        return theirs(model_id, dtype=dtype)
    torch.manual_seed(0)
    return ResidualMLP().to(dtype or torch.float32)

MockTransformerWrapper.from_pretrained = from_pretrained
SMALL = dict(target_modules=["norm0->mlp"], num_memory_tokens=8, num_heads=2)
TEST_CASES = [
    (f"memory {i}", "ResidualMLP", MemoryConfig, SMALL | options)
    for i, options in enumerate([
        {}, dict(block_variant="B"), dict(sharing="shared"), dict(bank_type="factorized", bank_rank=2),
        dict(bank_type="reduced", bank_rank=4), dict(num_chapters=4, top_k_chapters=4, routing="token"),
        dict(modules_to_save=["lin1"]), dict(target_modules="layers.*norm0->mlp"),
        dict(layers_to_transform=[1], placement="custom"),
        dict(sharing="group", group_size=1, exclude_modules=["layers.0.norm0"]),
    ])
]
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = []


"""

# testing_common imports it for tests of image models
NO_DIFFUSERS = """
import importlib.machinery
import sys
import types

diffusers = types.ModuleType("diffusers")
diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules.setdefault("diffusers", diffusers)
"""

MERGING = "a memory cannot be merged"  # of the error


def prepare() -> Path:
    """The tests/ folder of the installed PEFT version, with our tables in copies of two files."""
    name = f"peft-{peft.__version__}"
    root = CACHE / name
    if not (root / "tests").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, f"peft=={peft.__version__}", "-d", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, members=[m for m in archive if "/tests/" in m.name], filter="data")
    (root / "tests" / "__init__.py").touch()
    (root / "tests" / "conftest.py").write_text(NO_DIFFUSERS)
    models = CACHE / "models"
    for kind, config in CONFIGS.items():
        if not (models / kind).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(models / kind)
    edits = {
        "decoder": ("class TestDecoderModels", DECODER_CASES.format(models=str(models))),
        "custom": ("class TestPeftCustomModel", CUSTOM_CASES),
    }
    for kind, (start, cases) in edits.items():
        text = (root / "tests" / f"test_{kind}_models.py").read_text()
        if text.count(start) != 1:
            raise RuntimeError(f"PEFT {peft.__version__} has no {start!r} in test_{kind}_models.py")
        (root / "tests" / f"test_memzoo_{kind}.py").write_text(text.replace(start, cases + start))
    return root


def run(root: Path, kind: str, expression: str) -> tuple[dict[str, int], list[str]]:
    report = CACHE / f"{kind}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-c", os.devnull, "-k", expression]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with open(CACHE / f"{kind}.log", "w") as log:
        files = [f"--junitxml={report}", f"tests/test_memzoo_{kind}.py"]
        subprocess.run([*command, *files], cwd=root, env=environment, stdout=log, stderr=log)
    counts, failed = dict.fromkeys(("passed", "failed", "skipped", "merging"), 0), []
    for case in ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []:
        outcomes, name = {child.tag for child in case}, case.get("name", "?")
        messages = "".join(child.get("message", "") for child in case)
        outcome = "failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"
        if outcome == "failed" and MERGING in messages:
            outcome = "merging"
        counts[outcome] += 1
        failed += [name] if outcome == "failed" else []
    return counts, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="as in pytest")
    arguments = parser.parse_args()
    root, good = prepare(), True
    for kind in ("decoder", "custom"):
        counts, failed = run(root, kind, "MemoryConfig" + (f" and ({arguments.k})" if arguments.k else ""))
        good &= bool(counts["passed"]) and not failed
        print(f"{kind}:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), *failed, sep="\n  ")
        if failed or not counts["passed"]:
            print(f"  see {CACHE / kind}.log")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
