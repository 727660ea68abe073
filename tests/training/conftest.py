"""Tiny models and a tiny corpus; one thread, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from memzoo.training.config import parse_config

torch.set_num_threads(1)

TINY_MODELS = {
    "maru": {
        "model_type": "maru",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "memory_num_banks": 2,
        "memory_num_slots": 4,
        "memory_dim": 8,
        "dropout": 0.0,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two text files, one of them with characters of several bytes."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30, encoding="utf-8")
    (folder / "b.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 20, encoding="utf-8")
    return folder


@pytest.fixture
def settings(corpus, tmp_path):
    """Settings of a run of eight steps, as a nested dict; `settings("llama", training={...})`."""

    def make(family="maru", **sections):
        base = {
            "model": dict(TINY_MODELS[family]),
            "data": {"path": str(corpus), "block_size": 32, "eval_fraction": 0.1},
            "sample": {"prompts": ["The"], "max_new_tokens": 4},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "disable_tqdm": True,
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 4,
                "save_steps": 4,
            },
        }
        return {name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}}

    return make


@pytest.fixture
def run_config(settings):
    """The same, parsed."""
    return lambda family="maru", **sections: parse_config(settings(family, **sections))


TINY_LLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A fast tokenizer of bytes and three special tokens, with a chat template: `make_tokenizer(template=...)`."""

    def make(template=CHATML):
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)

    return make


@pytest.fixture(scope="session")
def make_base(make_tokenizer):
    """Writes a tiny random model and its tokenizer; returns the folder."""

    def make(folder, kind="llama", template=True, **more):
        tokenizer = make_tokenizer() if template else make_tokenizer(template=None)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**TINY_LLM, **ids, **more})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return make
