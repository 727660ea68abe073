"""A stream of files gives the blocks that reading them whole would give, each once, and goes on where it stopped."""

import logging
import shutil

import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training import trainer as trainer_module
from memzoo.training.config import ConfigError, DataConfig
from memzoo.training.data import BlockStream, collate_blocks, load_documents, load_parts, tokenize
from memzoo.training.data.bpe import train_bpe
from memzoo.training.data.documents import Part, open_folder
from memzoo.training.data.streaming import cut_parts
from memzoo.training.trainer import train

SENTENCES = [
    "The quick brown fox jumps. ",
    "Zwölf Boxkämpfer jagen Viktor. ",
    "x",
    "an end\n\n  and   more ",
    "日本語のテキスト",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five files of different lengths and scripts, one that is short and one that is empty."""
    folder = tmp_path_factory.mktemp("stream")
    for i, (sentence, times) in enumerate(zip(SENTENCES, (30, 20, 1, 25, 40), strict=True)):
        (folder / f"{i}.txt").write_text(sentence * times, encoding="utf-8")
    (folder / "9.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return open_folder(str(folder))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, parts):
    return MaruTokenizer() if request.param == "bytes" else train_bpe(map(bytes, parts), 300)


def rows(blocks):
    return sorted(tuple(block["input_ids"].tolist()) for block in blocks)


@pytest.mark.parametrize("block_size", [2, 7, 64, 10_000])
def test_every_token_of_every_file_is_predicted_once(parts, tokenizer, block_size):
    documents = iter(tokenize([bytes(part) for part in parts], tokenizer))
    read: list[int] = []
    for block in BlockStream(parts, tokenizer, block_size).one_pass(0):
        ids, labels = block["input_ids"].tolist(), block["labels"].tolist()
        assert 2 <= len(ids) <= block_size
        if ids[0] == tokenizer.bos_token_id:
            whole, read = next(documents).tolist(), [ids[0]]
        assert ids[0] == read[-1]  # given, as the last token of the block before
        read += ids[1:]
        assert labels[1:] == ids[1:]
        assert read == whole[: len(read)]
        if len(ids) < block_size:
            assert read == whole
    assert next(documents, None) is None


@pytest.mark.parametrize("piece", [8, 64, 500])
def test_the_tokens_do_not_depend_on_the_pieces_that_are_read(parts, piece):
    """Byte-level BPE too: a piece ends where a word ends."""
    text = [part for part in parts if b" " in bytes(part)]
    tokenizer = train_bpe(map(bytes, text), 320)
    whole = list(cut_parts(text, tokenizer, 16))
    if piece > 64:
        read = list(cut_parts(text, tokenizer, 16, piece))
        assert [block["tokens"].tolist() for block in read] == [block["tokens"].tolist() for block in whole]
    for part in parts:
        pieces = list(part.pieces(piece))
        assert b"".join(pieces) == bytes(part)
        assert all(len(p) <= piece and p.decode() is not None for p in pieces)


@pytest.mark.parametrize("num_files", [2, 5])
@pytest.mark.parametrize("buffer", [0, 7])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_workers_neither_lose_nor_repeat_a_block(parts, num_workers, buffer, num_files):
    parts, tokenizer = parts[:num_files], MaruTokenizer()
    expected = rows(BlockStream(parts, tokenizer, 32).one_pass(0))
    stream = BlockStream(parts, tokenizer, 32, buffer, seed=1, num_workers=num_workers)
    assert stream.num_workers == min(num_workers, num_files)
    first, second = list(stream.one_pass(0)), list(stream.one_pass(1))
    assert rows(first) == rows(second) == expected
    in_order = [block["input_ids"].tolist() for block in first] == [block["input_ids"].tolist() for block in second]
    assert in_order == (buffer == 0)


@pytest.mark.parametrize("dispatch", [True, False])
def test_two_ranks_share_the_blocks(parts, dispatch):
    """As Accelerate deals them out: rank 0 reads for both, or each reads all and keeps its part of every batch."""
    from accelerate.data_loader import IterableDatasetShard

    stream, size = BlockStream(parts, MaruTokenizer(), 32, 5), 4
    passed = [block["input_ids"].tolist() for block, _ in zip(stream, range(16))]
    if dispatch:
        batches = DataLoader(stream, batch_size=size, collate_fn=lambda b: collate_blocks(b, length=32))
        read = [batch["input_ids"] for batch, _ in zip(batches, range(4))]
        joined = [torch.cat(read[:2]), torch.cat(read[2:])]  # one batch for both ranks, then split
        got = [row for batch in joined for row in batch.tolist()]
        passed = [row + [0] * (32 - len(row)) for row in passed]
    else:
        ranks = [iter(IterableDatasetShard(stream, size, num_processes=2, process_index=rank)) for rank in (0, 1)]
        got = [next(rank)["input_ids"].tolist() for _ in range(2) for rank in ranks for _ in range(size)]
    assert got == passed


def test_two_nodes_split_the_files_of_datasets(parts):
    blocks = BlockStream(parts, MaruTokenizer(), 32).blocks
    whole = sorted(tuple(block["tokens"].tolist()) for block in blocks)
    split = [tuple(b["tokens"].tolist()) for rank in (0, 1) for b in split_dataset_by_node(blocks, rank, 2)]
    assert sorted(split) == whole


def test_batches_are_alike_and_pads_are_marked(parts):
    blocks = list(BlockStream(parts, MaruTokenizer(), 32).one_pass(0))
    short = min(range(len(blocks)), key=lambda i: len(blocks[i]["input_ids"]))
    for chosen in (blocks[:2], [blocks[0], blocks[short]]):
        batch = collate_blocks(chosen, pad_token_id=0, length=32)
        assert all(tensor.shape == (2, 32) for tensor in batch.values())
        for row, block in enumerate(chosen):
            length = len(block["input_ids"])
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (32 - length)
            assert (batch["labels"][row, length:] == -100).all() and (batch["input_ids"][row, length:] == 0).all()


def test_a_part_is_read_as_its_bytes_are(folder):
    content = (folder / "1.txt").read_bytes()
    part = Part.whole(folder / "1.txt")
    for piece in (slice(None), slice(5, 20), slice(None, 9), slice(30, 10), slice(len(content) - 3, None)):
        assert bytes(part[piece]) == content[piece] and len(part[piece]) == len(content[piece])
    assert part[3] == content[3] and part[5:][3] == content[8]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("max_eval_bytes", [None, 50])
def test_the_split_is_that_of_whole_documents(folder, fraction, max_eval_bytes):
    data = DataConfig(path=str(folder), eval_fraction=fraction, max_eval_bytes=max_eval_bytes)
    parts, held_out = load_parts(data)
    assert ([bytes(part) for part in parts], held_out) == load_documents(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_in_the_middle_of_the_third_pass(run_config, corpus, tmp_path, monkeypatch, workers):
    """A pass of 38 blocks, 4 a step: the checkpoint of step 24 lies in the third pass."""
    seen = []
    forward = trainer_module.MemzooTrainer.training_step

    def spy(self, model, inputs, *args):
        seen.append((self.state.global_step, inputs["input_ids"].tolist()))
        return forward(self, model, inputs, *args)

    monkeypatch.setattr(trainer_module.MemzooTrainer, "training_step", spy)
    data = {"streaming": True, "shuffle_buffer": 10, "block_size": 64, "eval_fraction": 0.1}
    steps = {"max_steps": 26, "save_steps": 24, "eval_strategy": "no", "dataloader_num_workers": workers}
    whole, part = tmp_path / "whole", tmp_path / "part"
    stream = train(run_config("llama", data=data, training={**steps, "output_dir": str(whole)})).train_dataset
    passes = 24 * 4 / len(list(stream.one_pass(0)))
    assert 2 < passes < 3
    first, seen[:] = dict(seen), []
    shutil.copytree(whole / "checkpoint-24", part / "checkpoint-24")
    again = {**steps, "output_dir": str(part), "resume_from_checkpoint": "auto"}
    train(run_config("llama", data=data, training=again))
    assert dict(seen) == {step: first[step] for step in (24, 25)}
    a, b = load_file(whole / "model.safetensors"), load_file(part / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_files_that_are_not_utf8_are_said_once(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(b"caf\xe9 " * 9)
    with caplog.at_level(logging.WARNING):
        parts, _ = load_parts(DataConfig(path=str(tmp_path), streaming=True, eval_fraction=0.0))
        blocks = list(BlockStream(parts, MaruTokenizer(), 16, num_workers=2).one_pass(0))
    assert [r.getMessage() for r in caplog.records if "UTF-8" in r.getMessage()] == [
        f"{tmp_path / 'a.txt'} and 1 more: not UTF-8, read as bytes"
    ]
    ids = np.concatenate([block["input_ids"][1:].numpy() for block in blocks])
    assert MaruTokenizer().decode_bytes(ids.tolist(), skip_special_tokens=True) == b"caf\xe9 " * 18


def test_the_training_loss_is_shown_in_bits_per_byte(parts, tokenizer):
    stream = BlockStream(parts, tokenizer, 32)
    counted = sum(int((block["labels"][1:] != -100).sum()) for block in stream.one_pass(0))
    assert stream.bits_per_nat == pytest.approx(counted / stream.num_bytes / np.log(2))


def test_a_file_that_shrinks_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("long enough")
    part = Part.whole(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match=r"a\.txt became shorter while it was read"):
        list(part.pieces())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"shuffle_buffer": 5}}, "data.shuffle_buffer: goes with data.streaming"),
        ({"data": {"streaming": True, "shuffle_buffer": -1}}, "data.shuffle_buffer: must not be negative"),
        ({"data": {"streaming": True, "path": None, "corpus": "sotu"}}, "data.streaming: goes with data.path"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(run_config, sections, message):
    with pytest.raises(ConfigError, match=r".") as error:
        run_config(**sections)
    assert message in str(error.value)


def test_a_stream_needs_a_number_of_steps(run_config):
    with pytest.raises(ConfigError, match=r"training\.max_steps: missing; a stream has no length"):
        train(run_config(data={"streaming": True}, training={"max_steps": -1}))
