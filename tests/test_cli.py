"""The `memzoo` command as a user types it."""

import io
import os
import subprocess
import sys

import pytest
import torch
import yaml

from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer, MemoryCache, __version__
from memzoo.cli import main

TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny untrained MARU with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = MaruTokenizer()
    config = MaruConfig(
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        memory_num_banks=2,
        memory_num_slots=4,
        memory_dim=8,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    MaruForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def memzoo(capsys, monkeypatch):
    """Runs a command with lines on stdin; returns exit code, stdout, stderr."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


GREEDY = ("--temperature", 0, "--max-new-tokens", 12)


def test_version_and_help_from_a_shell():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words, expected in ((["--version"], f"memzoo {__version__}"), (["train", "--help"], "training.max_steps=")):
        done = subprocess.run([sys.executable, "-m", "memzoo", *words], capture_output=True, text=True, env=env)
        assert done.returncode == 0
        assert expected in done.stdout


def test_train_then_generate(memzoo, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    settings = {
        "model": {"model_type": "maru", "hidden_size": 16, "num_hidden_layers": 1, "memory_num_banks": 0},
        "data": {"path": str(tmp_path), "block_size": 32},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "save_steps": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, out, _ = memzoo("train", tmp_path / "run.yaml", "training.max_steps=2")
    assert (code, out.splitlines()[-1]) == (0, f"model, tokenizer and loss.png are in {tmp_path / 'run'}")
    code, out, _ = memzoo("train", tmp_path / "run.yaml", "--resume", "training.max_steps=3")
    assert code == 0
    assert memzoo("generate", tmp_path / "run", "--prompt", "The", *GREEDY)[0] == 0


def test_generate_is_greedy_at_temperature_0_and_repeats_with_a_seed(memzoo, model_folder):
    code, greedy, _ = memzoo("generate", model_folder, "--prompt", TEXT, *GREEDY)
    assert code == 0
    assert greedy.startswith(TEXT)
    assert memzoo("generate", model_folder, "--prompt", TEXT, *GREEDY, "--stream")[1] == greedy
    sampled = [memzoo("generate", model_folder, "--prompt", TEXT, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    narrow = memzoo("generate", model_folder, "--prompt", TEXT, "--top-k", 1, "--max-new-tokens", 12)[1]
    assert narrow == greedy
    assert memzoo("generate", model_folder, "--prompt", TEXT, "--top-p", 1e-6, "--max-new-tokens", 12)[1] == greedy


def test_a_kept_memory_goes_on_as_if_never_interrupted(memzoo, model_folder, tmp_path):
    first, second = TEXT, "And then"
    one = memzoo("generate", model_folder, "--prompt", first, *GREEDY, "--save-memory", tmp_path / "m")[1]
    written = one.removesuffix("\n")
    assert MemoryCache.from_pretrained(tmp_path / "m", MaruConfig.from_pretrained(model_folder)).nbytes > 0
    resumed = memzoo("generate", model_folder, "--prompt", second, *GREEDY, "--memory", tmp_path / "m")[1]
    chat = memzoo("chat", model_folder, "--plain", *GREEDY, stdin=f"{first}\n")[1]
    whole = memzoo("generate", model_folder, "--prompt", written + second, *GREEDY)[1]
    if "\ufffd" not in written:  # what was written is text, and can be typed in again
        assert whole == written + resumed
    assert chat


def test_eval_with_and_without_memory(memzoo, model_folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 4)
    code, out, _ = memzoo("eval", model_folder, "--data", tmp_path, "--window", 50)
    assert code == 0
    bits = {line.split(":")[0].strip(): float(line.split()[1]) for line in out.splitlines()[1:]}
    assert set(bits) == {"carry", "window"}
    assert bits["carry"] != bits["window"]
    whole = memzoo("eval", model_folder, "--data", tmp_path, "--window", 10_000, "--mode", "window")[1]
    assert float(whole.splitlines()[1].split()[1]) == pytest.approx(bits["carry"], abs=1e-4)
    assert "100 bytes" in memzoo("eval", model_folder, "--data", tmp_path, "--max-bytes", 100)[1]


def test_chat_keeps_saves_loads_and_forgets(memzoo, model_folder, tmp_path):
    script = f"Hello\n/stats\n/save {tmp_path / 'm'}\n/reset\n/stats\n/load {tmp_path / 'm'}\n/stats\nBye\n/quit\n"
    code, out, _ = memzoo("chat", model_folder, *GREEDY, stdin=script)
    assert code == 0
    stats = [line for line in out.splitlines() if "tokens read and written" in line]
    assert len(stats) == 3
    assert stats[1].startswith("0 tokens")
    assert stats[0] == stats[2]
    again = memzoo("chat", model_folder, *GREEDY, "--memory", tmp_path / "m", stdin="Bye\n")[1]
    goodbye = again.splitlines()[1:-1]
    assert goodbye
    assert goodbye == out.splitlines()[-len(goodbye) :]


@pytest.mark.parametrize("plain", [True, False])
def test_a_chat_turn_holds_only_the_new_text(model_folder, plain):
    from memzoo.chat import plain_turn, template_turn

    tokenizer = MaruTokenizer.from_pretrained(model_folder)
    turn = (plain_turn if plain else template_turn)(tokenizer, "Hello")
    assert turn == ("Hello\n" if plain else "<|user|>Hello<eos><|assistant|>")


def test_chat_says_what_is_wrong_and_goes_on(memzoo, model_folder):
    script = "/load nowhere\n/save\n/dance\n/help\n\n/quit\nnever read\n"
    code, out, _ = memzoo("chat", model_folder, stdin=script)
    assert code == 0
    assert "error: nowhere holds no memory snapshot" in out
    assert "/save needs a folder" in out
    assert "no command /dance" in out
    assert "never" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (
            ["generate", "./missing"],
            "./missing is not a folder; give one that save_pretrained or `memzoo train` wrote",
        ),
        (["eval", "./missing", "--data", "./nothing"], "--data: ./nothing does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(memzoo, argv, message):
    code, _, err = memzoo(*argv)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("memzoo: error: ")
    assert message in err


def test_debug_shows_the_traceback(memzoo):
    with pytest.raises(FileNotFoundError):
        memzoo("--debug", "generate", "./missing")


def test_an_unknown_option_is_refused(memzoo):
    with pytest.raises(SystemExit, match="2"):
        memzoo("train", "a.yaml", "--resum_e")


def test_a_folder_of_checkpoints_is_no_model(memzoo, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    code, _, err = memzoo("generate", tmp_path)
    assert code == 2
    assert f"did you mean {tmp_path / 'checkpoint-5'}?" in err


def test_weights_cut_short_are_named(memzoo, model_folder, tmp_path):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = memzoo("generate", tmp_path)
    assert code == 2
    assert f"{weights} is cut short or damaged" in err


def test_the_memory_of_another_model_is_refused(memzoo, model_folder, tmp_path):
    other = MaruConfig(hidden_size=24, num_hidden_layers=1, memory_num_banks=1)
    MemoryCache(other).save_pretrained(tmp_path)
    code, _, err = memzoo("generate", model_folder, "--memory", tmp_path, "--prompt", "a")
    assert code == 2
    assert "belongs to another model" in err
