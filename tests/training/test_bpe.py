"""A tokenizer trained on one's own text gives every string back, and the model that uses it fits it."""

import shutil
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import memzoo
from memzoo.modeling.maru.tokenization_maru import SPECIAL_TOKENS, MaruTokenizer
from memzoo.training.config import SMALLEST_BPE, ConfigError
from memzoo.training.data.bpe import train_bpe
from memzoo.training.data.packing import encode
from memzoo.training.evaluate import evaluate_documents
from memzoo.training.sources import load_tokenizer
from memzoo.training.trainer import build_model, train

TEXT = ("The quick brown fox jumps over the lazy dog. " * 9 + "Zwölf Boxkämpfer jagen Viktor. " * 9).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved and loaded again."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe([TEXT], 300).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(st.text())
def test_every_string_comes_back(tokenizer, text):
    for split in (False, True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  a b \t",
        "a\r\nb",
        "\x00\x01",
        "👩‍👩‍👧 é e\u0301",
        "\ufeff\ufffd",
        "<bos> x <eos>",
        "a , b . ' s",
    ],
)
def test_odd_strings_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_special_tokens_are_those_of_the_bytes(tokenizer):
    bytes_only = MaruTokenizer()
    assert tokenizer.convert_ids_to_tokens(range(8)) == SPECIAL_TOKENS
    assert tokenizer.all_special_ids == bytes_only.all_special_ids
    assert tokenizer.padding_side == bytes_only.padding_side
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for prompt in (False, True):
        said = [
            t.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) for t in (tokenizer, bytes_only)
        ]
        assert said[0] == said[1]


def test_a_special_tokens_name_in_a_corpus_is_only_text(tokenizer):
    ids = encode([b"the <eos> dog"], tokenizer)[0]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "the <eos> dog"


def test_the_vocabulary_has_the_size_that_was_asked_for(caplog):
    assert len(train_bpe([TEXT], SMALLEST_BPE)) == SMALLEST_BPE
    assert len(train_bpe([TEXT], 290)) == 290
    assert not caplog.records
    small = train_bpe([b"ab ab"], 5000)
    assert f"only {len(small)} tokens of the 5000" in caplog.text
    assert len(train_bpe([b"ab ab"], 5000, min_frequency=3)) == SMALLEST_BPE < len(small)
    with pytest.raises(ConfigError, match="256 bytes and 8 special tokens; use 264 or more, not 263"):
        train_bpe([TEXT], 263)
    with pytest.raises(ConfigError, match="reads UTF-8 and some text is not"):
        train_bpe([b"\xff"], 300)


def test_the_same_text_gives_the_same_tokens():
    assert train_bpe([TEXT], 300).get_vocab() == train_bpe([TEXT], 300).get_vocab()


@pytest.mark.parametrize("text", ["acgt" * 100_000, " " * 400_000, "x" + "中文" * 50_000])
def test_a_text_without_words_is_learned_in_reasonable_time(text):
    start = time.process_time()
    tokenizer = train_bpe([text.encode()], 300)
    assert time.process_time() - start < 10  # minutes, when a word of this length is not cut
    assert tokenizer.decode(encode([text.encode()], tokenizer)[0]) == text


def test_bits_per_byte_of_a_uniform_model_count_its_tokens(tokenizer):
    """Every token costs log2 of the vocabulary, so bits per byte say how many tokens a byte takes."""
    config = CONFIG_MAPPING["maru"](
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, memory_num_banks=0, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = evaluate_documents(model, tokenizer, [TEXT], window=64, carry=False)
    num_tokens = len(tokenizer(TEXT.decode())["input_ids"]) + 1  # and the end
    assert score.num_tokens == num_tokens
    assert score.bits_per_byte == pytest.approx(num_tokens * torch.tensor(300.0).log2().item() / len(TEXT), rel=1e-5)


BPE = {"type": "bpe", "vocab_size": 320}
TASK = {"path": None, "eval_fraction": 0.05, "block_size": 256, "task": "arithmetic"}


def test_a_run_trains_it_once_and_resumes_with_it(run_config, corpus, tmp_path):
    whole = tmp_path / "whole"
    trainer = train(run_config(tokenizer=BPE, training={"output_dir": str(whole)}))
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert len(tokenizer) == trainer.model.config.vocab_size == 320
    assert trainer.model.config.eos_token_id == tokenizer.eos_token_id
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-4", part / "checkpoint-4")
    texts = corpus.rename(corpus.with_name("moved"))
    shutil.copytree(texts, corpus)
    (corpus / "a.txt").write_text("Other words make other tokens. " * 45)  # the text changed, the tokens must not
    try:
        again = {"output_dir": str(part), "resume_from_checkpoint": "auto"}
        train(run_config(tokenizer=BPE, training=again))
    finally:
        shutil.rmtree(corpus)
        texts.rename(corpus)
    assert AutoTokenizer.from_pretrained(part).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("family", sorted(memzoo._FAMILIES))
def test_every_family_takes_its_vocabulary(run_config, tokenizer, tmp_path, family):
    tokenizer.save_pretrained(tmp_path / "tokens")
    config = run_config(tokenizer={"pretrained": str(tmp_path / "tokens")})
    heads = {"num_attention_heads": 2} if hasattr(CONFIG_MAPPING[family], "num_attention_heads") else {}
    config.model = {"model_type": family, "hidden_size": 32, "num_hidden_layers": 1, **heads}
    model = build_model(config, load_tokenizer(config), seed=0).eval()
    assert model.config.vocab_size == len(tokenizer) == 300
    ids = tokenizer("The quick brown fox", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] == ids["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"tokenizer": BPE, "model": {"vocab_size": 300}},
            "model.vocab_size: 300 is below the 320 of tokenizer.vocab",
        ),
        ({"tokenizer": {"vocab_size": 500}}, "tokenizer.vocab_size: goes with tokenizer.type bpe"),
        ({"tokenizer": {"min_frequency": 3}}, "tokenizer.min_frequency: goes with tokenizer.type bpe"),
        ({"tokenizer": {**BPE, "min_frequency": 0}}, "tokenizer.min_frequency: must be positive"),
        ({"tokenizer": {"type": "bpe", "vocab_size": 100}}, "tokenizer.vocab_size: a BPE has 256 bytes and 8 special"),
        ({"tokenizer": {**BPE, "pretrained": "x"}}, "tokenizer.type: goes without tokenizer.pretrained"),
        ({"tokenizer": {"type": "words"}}, "tokenizer.type: expected Optional"),
        ({"tokenizer": BPE, "data": TASK}, "data.task brings its own tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(run_config, sections, message):
    with pytest.raises(ConfigError, match=r".") as error:
        run_config(**sections)
    assert message in str(error.value)


def test_a_larger_vocabulary_of_the_model_is_taken(run_config, tmp_path):
    train(run_config(tokenizer=BPE, model={"vocab_size": 384}, training={"max_steps": 1, "eval_strategy": "no"}))
    assert load_file(tmp_path / "run" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 384


def test_bytes_can_be_named(run_config):
    assert isinstance(load_tokenizer(run_config(tokenizer={"type": "bytes"})), MaruTokenizer)
