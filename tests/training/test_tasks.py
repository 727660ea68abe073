"""Every task is what it says: answers follow from what stands before them, and a seed decides the rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from memzoo.training.bench.suites import check_answers
from memzoo.training.config import ConfigError
from memzoo.training.tasks import TASKS, build_task, task_class
from memzoo.training.tasks.common import IGNORED, TaskDataset, accuracy, answers

SIZES = {
    "copy_memory": [
        {},
        {"vocab_size": 4, "num_items": 1, "delay": 0},
        {"vocab_size": 5, "num_items": 3, "delay": 7, "feed_back": False},
    ],
    "associative_recall": [{}, {"num_pairs": 1, "num_keys": 1, "num_values": 2, "gap": 0}],
    "multi_query_recall": [{}, {"num_pairs": 6, "num_queries": 6, "num_keys": 6, "num_values": 9, "gap": 5}],
    "selective_copy": [{}, {"num_tokens": 1, "num_marked": 1, "num_symbols": 2}, {"num_tokens": 9, "num_marked": 9}],
    "induction_head": [
        {},
        {"length": 4, "num_symbols": 3},
        # few symbols and long sequences: noise often makes the prefix by chance
        {"length": 300, "num_symbols": 4, "prefix_length": 2, "answer_length": 3},
        {"length": 300, "num_symbols": 3, "prefix_length": 1, "answer_length": 2},
    ],
}
CASES = [(name, sizes) for name, cases in SIZES.items() for sizes in cases]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_answers_are_found_by_search_in_what_stands_before(name, sizes):
    task = build_task(name, sizes)
    ids, labels = task.sample(64, seed=3)
    assert ids.shape == labels.shape == (64, task.length)
    assert ids.min() >= 0 and ids.max() < task.vocab_size
    assert check_answers(task, size=64, seed=3) == (labels != IGNORED).sum()
    assert ((labels != IGNORED).sum(1) >= 1).all(), "a sequence without an answer"
    if getattr(task, "feed_back", True):
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


@pytest.mark.parametrize("name", SIZES)
def test_an_answer_that_does_not_follow_is_noticed(name, monkeypatch):
    task = build_task(name, {})
    ids, labels = task.sample(8, seed=0)
    labels[3, -1] = (labels[3, -1] + 1) % task.vocab_size
    monkeypatch.setattr(type(task), "sample", lambda self, size, seed: (ids, labels))
    with pytest.raises(ValueError, match="does not follow"):
        check_answers(task)


@pytest.mark.parametrize("name", SIZES)
def test_the_seed_decides(name):
    task = build_task(name, {})
    assert torch.equal(task.sample(4, seed=1)[0], task.sample(4, seed=1)[0])
    assert not torch.equal(task.sample(4, seed=1)[0], task.sample(4, seed=2)[0])


@pytest.mark.parametrize("name", SIZES)
def test_guessing_among_the_possible_answers_is_right_as_often_as_chance_says(name):
    task = build_task(name, {})
    _, labels = task.sample(4000, seed=0)
    given = labels[labels != IGNORED]
    shares = torch.bincount(given) / len(given)
    possible = shares[shares > 0]
    assert len(possible) in (round(1 / task.chance), round(1 / task.chance) + 1)
    assert possible.max() < 1.5 * task.chance, "one answer is likelier than the others"


@pytest.mark.parametrize("name", SIZES)
def test_another_length_asks_the_same_question(name):
    task = build_task(name, {})
    for length in (task.length, 4 * task.length, 16 * task.length):
        other = task.at_length(length)
        assert length - 1 <= other.length <= length  # pairs leave an odd token out
        assert other.vocab_size == task.vocab_size
        assert (other.sample(2, 0)[1] != IGNORED).sum() == (task.sample(2, 0)[1] != IGNORED).sum()
        check_answers(other, size=4)
    assert task.at_length(task.length) == task
    with pytest.raises(ValueError, match=r"\b1\b"):
        task.at_length(1)


def test_noise_of_an_induction_task_never_repeats_the_prefix():
    task = build_task("induction_head", {"length": 500, "num_symbols": 4, "prefix_length": 2})
    ids, _ = task.sample(64, seed=0)
    asked = task.length - 3
    for row in ids.tolist():
        assert sum(row[i : i + 2] == row[asked : asked + 2] for i in range(asked)) == 1
    assert (ids == ids[:, asked, None]).sum(1).max() > 2, "the prefix's first symbol alone does occur again"


def test_markers_alone_tell_what_is_to_be_copied():
    task = build_task("selective_copy", {"num_tokens": 16, "num_marked": 4, "num_symbols": 2})
    ids, _ = task.sample(500, seed=0)
    symbols, markers = ids[:, :32:2], ids[:, 1:32:2]
    assert set(symbols.unique().tolist()).isdisjoint(markers.unique().tolist())
    for symbol in symbols.unique():  # marked a quarter of the time, whichever it is
        assert (markers[symbols == symbol] == 2).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("copy_memory", {"vocab_size": 3}, "vocab_size=3 has 1 symbol"),
        ("copy_memory", {"num_items": 0}, "num_items=0 has no answer"),
        ("copy_memory", {"delay": -1}, "delay=-1"),
        ("multi_query_recall", {"num_pairs": 65}, "num_pairs=65, num_keys=64"),
        ("multi_query_recall", {"num_queries": 17}, "num_queries=17, num_pairs=16"),
        ("multi_query_recall", {"num_queries": 0}, "num_queries=0"),
        ("associative_recall", {"num_values": 1}, "num_values=1"),
        ("associative_recall", {"gap": -1}, "gap=-1"),
        ("selective_copy", {"num_marked": 33}, "num_marked=33, num_tokens=32"),
        ("selective_copy", {"num_marked": 0}, "num_marked=0"),
        ("selective_copy", {"num_symbols": 1}, "num_symbols=1"),
        ("induction_head", {"length": 3}, "length=3 .* takes 4"),
        ("induction_head", {"num_symbols": 3, "prefix_length": 2}, "num_symbols=3 .* 4"),
        ("induction_head", {"prefix_length": 0}, "got 0 and 1"),
    ],
)
def test_sizes_with_no_answer_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_task(name, sizes)


def test_a_filler_that_training_never_showed_is_refused():
    with pytest.raises(ValueError, match=r"gap=0 has 48 tokens and cannot have 96"):
        build_task("multi_query_recall", {"gap": 0}).at_length(96)


def test_names_and_sizes_are_checked():
    with pytest.raises(ConfigError, match="did you mean task copy_memory"):
        build_task("copy_memry", {})
    with pytest.raises(ConfigError, match=r"did you mean copy_memory\.delay"):
        build_task("copy_memory", {"dely": 3})
    with pytest.raises(ConfigError, match=r"copy_memory\.delay: expected int"):
        build_task("copy_memory", {"delay": "long"})
    assert all(task_class(name).__name__.endswith("Task") for name in TASKS)


def test_a_dataset_is_drawn_block_by_block_and_its_seed_decides():
    task = build_task("copy_memory", {"delay": 1})
    data = TaskDataset(task, TaskDataset.BLOCK + 3, seed=5)
    rows = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    again = TaskDataset(task, TaskDataset.BLOCK + 3, seed=5)
    assert torch.equal(again[len(data) - 1]["input_ids"], rows[-1]), "the order of reading changes nothing"
    assert torch.equal(again[1]["input_ids"], rows[1])
    assert len(rows.unique(dim=0)) == len(rows)
    other = TaskDataset(task, 8, seed=6)
    assert not torch.equal(other[0]["input_ids"], rows[0])
    with pytest.raises(IndexError):
        data[len(data)]


def test_accuracy_counts_answers_only():
    logits = torch.zeros(2, 4, 5)
    logits[:, 0, 3] = logits[:, 2, 4] = 1.0  # predicts 3 at position 1 and 4 at position 3
    labels = torch.tensor([[IGNORED, 3, IGNORED, 4], [IGNORED, 3, IGNORED, 1]])
    prediction = EvalPrediction(np.asarray(answers((logits,), labels)), labels.numpy())
    assert accuracy(prediction) == {"accuracy": 0.75, "exact": 0.5}


def test_tasks_are_values():
    task = build_task("copy_memory", {"delay": 7})
    assert task == replace(build_task("copy_memory", {}), delay=7)
    with pytest.raises(AttributeError):
        task.delay = 8
