"""Every string comes back; the tokenizer does what any Hugging Face tokenizer does."""

import json
import os
import pickle
import time

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, TextIteratorStreamer

from memzoo import MaruConfig, MaruTokenizer

TEXTS = [
    "",
    "plain",
    "line\nline\r\n\ttab  two spaces ",
    "naïve café, Ünïcödé, 漢字, 🧠👩‍👩‍👧",
    "NUL \0 and DEL \x7f",
    "bytes \udc80\udcff of a file",
    "\udcc3\udca9 would be é",
    "\ud83d\ude00 is a pair of lone surrogates",
    "\ud800",
    "<bos>typed<|user|><pad>",
    "<0x41> <unused_3>",
]
any_text = st.text(st.characters(codec=None))


@pytest.fixture(scope="module")
def tokenizer():
    return MaruTokenizer()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_round_trip(tokenizer, text, split_special_tokens):
    ids = tokenizer.encode(text, split_special_tokens=split_special_tokens)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, split_special_tokens=split_special_tokens)) == ids
    if split_special_tokens:
        assert all(row >= 8 for row in ids)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
@example(text="\udced\udca0\udc80")
def test_round_trip_of_any_text(text):
    tokenizer = MaruTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(data=st.binary())
def test_bytes(data):
    tokenizer = MaruTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    text = data.decode("utf-8", "surrogateescape")  # how Python reads a file that is not UTF-8
    assert (
        tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)).encode("utf-8", "surrogateescape") == data
    )


def test_what_is_not_text_decodes_to_replacement_characters(tokenizer):
    assert tokenizer.decode([*tokenizer.encode_bytes(b"\xc3A\xff"), 999]) == "\ufffdA\ufffd\ufffd"
    assert tokenizer.decode_bytes([8 + 0xC3, 2, 8 + 0x41], skip_special_tokens=True) == b"\xc3A"
    assert tokenizer.decode(73) == "A"
    assert tokenizer.decode_bytes(torch.tensor([73, 1])) == b"A<bos>"
    with pytest.raises(ValueError, match="-100"):
        tokenizer.decode([73, -100])


def test_layout(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == 264
    assert sorted(tokenizer.get_vocab().values()) == list(range(264))
    assert tokenizer.encode("Aé\n") == [8 + byte for byte in (0x41, 0xC3, 0xA9, 0x0A)]
    assert tokenizer.decode([1, 73, 2, 6], skip_special_tokens=True) == "A"
    config = MaruConfig()
    assert config.vocab_size == len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)


def test_special_tokens_and_pairs(tokenizer):
    around = MaruTokenizer(special_tokens_pattern="bos_eos")
    assert around("A").input_ids == [1, 73, 2]
    pair = around("A", "B", return_special_tokens_mask=True)
    assert pair.input_ids == [1, 73, 3, 74, 2]
    assert pair.special_tokens_mask == [1, 0, 1, 0, 1]
    assert tokenizer([("A", "B"), ("", "")]).input_ids == [[73, 3, 74], [3]]
    assert around(["AB", "CDE"], truncation=True, max_length=3).input_ids == [[1, 73, 2], [1, 75, 2]]
    with pytest.raises(ValueError, match="bos_eos"):
        MaruTokenizer(special_tokens_pattern="cls_sep")


def test_batches(tokenizer):
    left = tokenizer(["A", "BC"], padding=True, return_tensors="pt")
    assert torch.equal(left.input_ids, torch.tensor([[0, 73], [74, 75]]))
    assert torch.equal(left.attention_mask, torch.tensor([[0, 1], [1, 1]]))
    right = tokenizer(["A", "BC"], padding=True, padding_side="right", pad_to_multiple_of=4)
    assert right.input_ids == [[73, 0, 0, 0], [74, 75, 0, 0]]
    assert tokenizer.batch_decode(left.input_ids, skip_special_tokens=True) == ["A", "BC"]
    assert tokenizer([["A", "é"]], is_split_into_words=True).input_ids == [tokenizer.encode("Aé")]
    assert tokenizer([[73, 74]], padding="max_length", max_length=3).input_ids == [[0, 73, 74]]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"special_tokens_pattern": "bos"},
        {"characters": "abc é"},
        {"characters": {"[P]": 3, "a": 9}, "pad_token": "[P]"},
    ],
)
def test_save_load_pickle(tmp_path, arguments):
    tokenizer = MaruTokenizer(**arguments, padding_side="right")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    text = "aaa<new>a"
    for other in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is MaruTokenizer
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.special_tokens_map == tokenizer.special_tokens_map
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(other.encode(text), skip_special_tokens=True) == text
        assert other.padding_side == "right"
        assert (other.chat_template is None) == ("characters" in arguments)


def test_characters():
    tokenizer = MaruTokenizer.from_characters({"<PAD>": 0, "<UNK>": 1, "a": 2, "é": 3, "\n": 4}, pad_token="<PAD>")
    assert len(tokenizer) == 256
    assert tokenizer.encode("aé\n<PAD>") == [2, 3, 4, 0]
    assert tokenizer.decode([0, 1, 2, 3, 4, 200], skip_special_tokens=True) == "aé\n\ufffd"
    assert tokenizer.eos_token_id == 254
    with pytest.raises(ValueError, match=r"'z' \(U\+007A, position 1\).*MaruTokenizer\(\)"):
        tokenizer.encode("az")
    with pytest.raises(ValueError, match="no bytes"):
        tokenizer.encode_bytes(b"a")
    full = MaruTokenizer.from_characters([chr(0x100 + i) for i in range(252)])
    assert sorted(full.get_vocab().values()) == list(range(256))


@pytest.mark.parametrize(
    ("characters", "message"),
    [("aa", "twice"), ({"a": 1, "b": 1}, "twice"), ({"a": 256}, "0 to 255"), (["a", ""], "empty"), ("\ud800", "lone")]
    + [([chr(0x100 + i) for i in range(253)], "leave characters out")],
)
def test_bad_characters(characters, message):
    with pytest.raises(ValueError, match=message):
        MaruTokenizer.from_characters(characters)


def test_chat_template(tokenizer):
    chat = [{"role": "user", "content": "Hi <eos>"}, {"role": "assistant", "content": "é"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Hi <eos><eos><|assistant|>é<eos><|assistant|>"
    ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 2  # the user's own "<eos>" stays text
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "judge", "content": ""}])


@pytest.mark.parametrize("text", ["naïve 漢字 and 🧠 done\nnext é", "漢字漢字", "🧠", "é" * 9])
def test_streaming_never_shows_half_a_character(tokenizer, text):
    streamer = TextIteratorStreamer(tokenizer)
    for row in tokenizer.encode(text):
        streamer.put(torch.tensor([row]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_added_tokens_with_stripping(tokenizer):
    from transformers import AddedToken

    tokenizer = MaruTokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True), "é", "<mask>2"])
    assert tokenizer.encode("a <mask>b") == [8 + 97, 264, 8 + 98]
    assert tokenizer.encode("é<mask>2") == [265, 266]
    assert tokenizer.decode([265, 8 + 0xE9, 266]) == "é\ufffd<mask>2"


def test_datasets_map(tokenizer, tmp_path):
    data = Dataset.from_dict({"text": TEXTS[:4]}).map(lambda row: tokenizer(row["text"]), num_proc=2)
    assert [tokenizer.decode(ids) for ids in data["input_ids"]] == TEXTS[:4]


def test_saved_folder_is_plain_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "MaruTokenizer"
    assert sorted(os.listdir(tmp_path)) == ["chat_template.jinja", "tokenizer_config.json"]


def test_speed(tokenizer):
    text = "The quick brown fox jumps over the naïve dog.\n" * 22_000  # 1 MB
    start = time.perf_counter()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert time.perf_counter() - start < 3  # 0.15 s on an idle core
