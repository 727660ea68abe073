"""The command lines of README, CONTRIBUTING and docs are checked, and run where they can be run (`commands.py`)."""

import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memzoo import MaruTokenizer, MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryConfig
from memzoo.cli import main
from memzoo.training.config import load_config

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "hub")]
commands = importlib.import_module("commands")
checks = importlib.import_module("checks")
loopback = importlib.import_module("loopback")
ROOT, PAGES = commands.ROOT, commands.PAGES
EVERY = [command for page in PAGES for command in commands.commands_of(page)]
TEXT = "The quick brown fox jumps over the lazy dog. My fellow citizens, the state of the Union is strong. " * 20
TASK = """\
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: my-tasks/rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
ROW = '{"question": "The sky is", "choices": ["blue", "loud"], "answer": 0}\n'
CHAT = '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A goat."}]}\n'


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """A folder with what the pages speak of: texts, conversations, a trained model, its memory, models, an adapter."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my-texts").mkdir()
    for name in "ab":
        (folder / "my-texts" / f"{name}.txt").write_text(TEXT)
    (folder / "notes.txt").write_text(TEXT[:300])
    (folder / "chats.jsonl").write_text(CHAT * 40)
    (folder / "my-tasks").mkdir()
    (folder / "my-tasks" / "my_task.yaml").write_text(TASK)
    (folder / "my-tasks" / "rows.jsonl").write_text(ROW * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            f"train {ROOT}/training/configs/maru_demo.yaml {commands.OWN} {commands.TEXT}",
            "generate demo/model --prompt Hi --max-new-tokens 2 --save-memory my-memory",
            "tokenizer --data my-texts --vocab-size 280 --out tiny-base",
        ):
            assert main(line.split()) == 0
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)).save_pretrained(folder / "tiny-base")
    lora = {"r": 2, "target_modules": ["q_proj"]}
    memory = MemoryConfig(num_memory_tokens=8, num_heads=2, task_type="CAUSAL_LM", lora_config=lora)
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny-base")
    get_peft_model(base, memory).save_pretrained(folder / "runs" / "my_adapter")
    shutil.copytree(folder / "demo" / "model", folder / "runs" / "a")
    bank = MemoryBankTransformerConfig(
        **sizes, vocab_size=264, memory_num_tokens=8, memory_num_chapters=4, memory_zero_init=False
    )
    MemoryBankTransformerForCausalLM(bank).save_pretrained(folder / "runs" / "my_bank_transformer")
    MaruTokenizer().save_pretrained(folder / "runs" / "my_bank_transformer")
    return folder


@pytest.fixture
def reader(furnished, tmp_path, monkeypatch):
    """A copy of it beside the repository's own folders, where we are; what is asked on the keyboard is answered."""
    shutil.copytree(furnished, tmp_path / "reader")
    for name in (
        "training",
        "benchmarks",
        "examples",
        "docs",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
    ):
        (tmp_path / "reader" / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/save kept\n/quit\n"))
    return tmp_path / "reader"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with loopback.serve(tmp_path_factory.mktemp("hub")) as server:
        yield server


def words_of(text):
    return commands._without_environment(shlex.split(commands.filled_in(text)))


def test_every_command_is_known_and_every_rule_is_needed():
    tables = (commands.RUN, commands.SLOW, commands.CHECKED)
    unknown = [f"{c.name}: {c.text}" for c in EVERY if commands.rule(c.text, *tables) is None]
    assert not unknown, "say in tests/docs/commands.py how to test these"
    used = {commands.rule(c.text, *tables) for c in EVERY}
    assert used == {key for table in tables for key in table}
    assert len(EVERY) > 80


def test_blocks_are_of_languages_that_are_tested():
    for page in PAGES:
        fences = re.findall(r"^ *```(\w*)", page.read_text(), flags=re.MULTILINE)[::2]
        assert set(fences) <= set(commands.LANGUAGES), page


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command.name)
def test_what_a_command_names_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = words_of(command.text)
    checks.CHECKS[words[0]](words[1:], monkeypatch, synopsis="CONFIG.yaml" in command.text or "..." in command.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page, reader, server, monkeypatch):
    """In the order of the page, each where the one before left things."""
    for command in commands.commands_of(page):
        if (rule := commands.rule(command.text, commands.RUN, commands.SLOW, commands.CHECKED)) in commands.RUN:
            run(command, commands.RUN[rule], reader, server, monkeypatch)


SLOW = [c for c in EVERY if commands.rule(c.text, commands.RUN, commands.SLOW, commands.CHECKED) in commands.SLOW]


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW, ids=lambda command: command.name)
def test_slow_commands_run(command, reader, server, monkeypatch):
    run(command, commands.SLOW[commands.rule(command.text, commands.SLOW)], reader, server, monkeypatch)


def run(command, small, folder, server, monkeypatch):
    program, *words = words_of(command.text)
    if (program == "memzoo" and len(words) < 2) or "CONFIG.yaml" in command.text:  # a mention
        return
    words += shlex.split(small)
    outputs = [words[i + 1] for i, word in enumerate(words) if word == "--out"]
    if words[0] == "train" and "--resume" not in words:
        outputs.append(load_config(words[1], words[2:]).training["output_dir"])
    for output in outputs:  # a page may show two ways to one folder
        shutil.rmtree(output, ignore_errors=True)
    if program == "memzoo":
        if "--tasks" in words:
            pytest.importorskip("lm_eval")
        with monkeypatch.context() as patch:
            if words[0] in ("push", "pull"):
                loopback.point_client_at(server, folder, patch)
            assert main(words) == 0, f"{command.name}: memzoo {shlex.join(words)}"
        return
    program = {"python": sys.executable}.get(program, program)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run([program, *words], capture_output=True, text=True, env=environment)
    if "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"{command.name}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, f"{command.name}: {shlex.join(words)}\n{done.stderr[-3000:]}"
