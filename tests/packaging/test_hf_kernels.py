"""Our kernels/ folder is not taken for Hugging Face's `kernels`, even in a shell opened in the repository root."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).parents[2]

BUILD_MODELS = """
import os, sys
assert "" in sys.path and os.path.isdir("kernels/selective_scan")
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import is_kernels_available

tiny = dict(hidden_size=32, num_hidden_layers=1, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2, intermediate_size=32))
MambaForCausalLM(MambaConfig(**tiny))
import memzoo
print(is_kernels_available())
"""

# What transformers imports from Hugging Face's package, on a machine without a network.
FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs):
        pass
    def __getattr__(self, name):
        return name

def get_kernel(*args, **kwargs):
    raise FileNotFoundError("no network")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {}) if name[0].isupper() else lambda *args, **kwargs: lambda cls: cls
"""


def test_without_kernels(run, installed):
    assert run(installed, "-c", BUILD_MODELS, cwd=ROOT) == "False"


def test_with_kernels(run, installed, tmp_path):
    import transformers.utils.import_utils as versions

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(FAKE_KERNELS)
    metadata = tmp_path / f"kernels-{versions.KERNELS_MIN_VERSION}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {versions.KERNELS_MIN_VERSION}\n")
    assert run(installed, "-c", BUILD_MODELS, cwd=ROOT, PYTHONPATH=str(tmp_path)) == "True"
