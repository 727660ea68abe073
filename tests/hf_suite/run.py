"""Run transformers' own common model tests, unchanged, on memzoo's model types.

    python tests/hf_suite/run.py maru [TYPE ...] [-k EXPRESSION]

The tests come from the source distribution of the very transformers version that is installed; pip fetches it once
into a cache folder, HF_SUITE_DIR. One line per type: passed, failed, skipped, and the names that failed; exit status 1
if any failed or none ran.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers

CACHE = Path(os.environ.get("HF_SUITE_DIR") or Path(tempfile.gettempdir()) / "hf_suite")

# Modules that test_modeling_common imports and that the source distribution does not carry.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fixtures/sample_text.txt": "Two lines of text.\n\nThe second has a word in Français.\n",
}

TEST_FILE = """
import unittest

import memzoo
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

TINY = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)


def make_config():
    kind = type(AutoConfig.for_model("{model_type}"))
    names = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    return kind(**{{name: value for name, value in TINY.items() if name in names}})


class Tester:
    batch_size, seq_length, is_training = 5, 9, True

    def __init__(self, parent):
        config = make_config()
        self.parent = parent
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = getattr(config, "num_attention_heads", 4)
        self.causal_lm_class = AutoModelForCausalLM._model_mapping[type(config)]
        self.base_model_class = AutoModel._model_mapping[type(config)]

    def get_config(self):
        return make_config()

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}


class FamilyTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    has_attentions = {has_attentions}
    test_missing_keys = False

    def setUp(self):
        self.model_tester = Tester(self)
        self.all_model_classes = (self.model_tester.base_model_class, self.model_tester.causal_lm_class)
"""

TOKENIZER_TESTS = """

import unittest

from memzoo import {tokenizer}

from .test_tokenization_common import TokenizerTesterMixin


class TokenizerTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = {tokenizer}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.get_tokenizer().save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {{}})]

    @classmethod
    def get_tokenizer(cls, *args, **kwargs):
        tokenizer = cls.tokenizer_class(**kwargs)
        tokenizer.add_prefix_space = False  # words are joined as they are
        return tokenizer
"""

# Families with a tokenizer of their own, and those whose layers return attention maps.
TOKENIZERS = {"maru": "MaruTokenizer"}
WITH_ATTENTIONS: set[str] = set()


def fetch_tests() -> Path:
    """The tests/ folder of the installed transformers version."""
    name = f"transformers-{transformers.__version__}"
    root = CACHE / name
    if not (root / "tests").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, f"transformers=={transformers.__version__}", "-d", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            wanted = [member for member in archive if "/tests/" in member.name or member.name.endswith("README.md")]
            archive.extractall(CACHE, members=wanted, filter="data")
        (root / "src").mkdir(exist_ok=True)
        if not (root / "src/transformers").exists():  # some tests look for the source tree beside them
            (root / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    for path, text in STUBS.items():
        target = root / "tests" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return root


def run(root: Path, model_type: str, expression: str) -> tuple[Counter, list[str]]:
    test_file = root / "tests" / f"test_memzoo_{model_type}.py"
    code = TEST_FILE.format(model_type=model_type, has_attentions=model_type in WITH_ATTENTIONS)
    if model_type in TOKENIZERS:
        code += TOKENIZER_TESTS.format(tokenizer=TOKENIZERS[model_type])
    test_file.write_text(code)
    report = CACHE / f"{model_type}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", expression]
    environment = dict(os.environ, RUN_TRAINING_TESTS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with open(CACHE / f"{model_type}.log", "w") as log:
        subprocess.run(
            [*command, f"--junitxml={report}", str(test_file)], cwd=root, env=environment, stdout=log, stderr=log
        )
    counts, failed = Counter(), []
    for case in ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []:
        outcomes = {child.tag for child in case}
        outcome = "failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(case.get("name", "?"))
    return counts, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="+", metavar="TYPE", help="an AutoConfig model type")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="as in pytest")
    arguments = parser.parse_args()
    root = fetch_tests()
    good = True
    for model_type in arguments.types:
        counts, failed = run(root, model_type, arguments.k)
        good &= bool(counts["passed"]) and not failed
        print(
            f"{model_type}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", *failed
        )
        if failed or not counts["passed"]:
            print(f"  see {CACHE / model_type}.log")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
