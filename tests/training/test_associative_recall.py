"""The task is what it says, and depends on nothing but its seed."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from memzoo import MaruConfig
from memzoo.training.tasks.associative_recall import (
    IGNORED,
    RecallDataset,
    RecallTask,
    accuracy,
    answers,
    train_recall,
)


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (4, 2, 8, 3), (6, 6, 6, 9)])
def test_every_answer_follows_from_exactly_one_pair(gap, sizes):
    task = RecallTask(*sizes, gap=gap)
    ids, labels = task.sample(50, seed=3)
    assert ids.shape == labels.shape == (50, task.length)
    assert ids.min() >= 0 and ids.max() < task.vocab_size
    for row, answer in zip(ids.tolist(), labels.tolist(), strict=True):
        pairs, rest = row[: 2 * task.num_pairs], row[2 * task.num_pairs :]
        value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(value_of) == task.num_pairs
        assert rest[:gap] == [0] * gap
        asked, given = rest[gap::2], rest[gap + 1 :: 2]
        assert len(set(asked)) == task.num_queries
        assert [value_of[key] for key in asked] == given
        assert answer == [IGNORED] * (len(row) - 2 * task.num_queries) + [
            part for value in given for part in (IGNORED, value)
        ]


def test_the_seed_decides():
    task = RecallTask()
    same, other = (task.sample(4, seed=1)[0], task.sample(4, seed=2)[0])
    assert torch.equal(same, RecallDataset(task, 4, seed=1).input_ids)
    assert not torch.equal(same, other)


@pytest.mark.parametrize(
    "sizes",
    [{"num_pairs": 65}, {"num_queries": 17}, {"num_queries": 0}, {"num_values": 1}, {"gap": -1}],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"needs 1 <= num_queries|nothing to recall|must not be negative"):
        RecallTask(**sizes)


def test_accuracy_counts_answers_only():
    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 3] = logits[0, 2, 4] = 1.0  # predicts 3 at position 1 and 4 at position 3
    for labels, right in (([IGNORED, 3, IGNORED, 4], 1.0), ([IGNORED, 3, IGNORED, 1], 0.5)):
        labels = torch.tensor([labels])
        prediction = EvalPrediction(np.asarray(answers(logits, labels)), labels.numpy())
        assert accuracy(prediction) == {"accuracy": right}


def test_a_run_is_repeatable(tmp_path):
    task = RecallTask(num_pairs=2, num_queries=2, num_keys=4, num_values=4)

    def run():
        config = MaruConfig(hidden_size=16, num_hidden_layers=1, state_size=4, memory_num_slots=4, memory_dim=8)
        options = {"max_steps": 4, "eval_steps": 2, "disable_tqdm": True, "use_cpu": True}
        return train_recall(config, task, 0, str(tmp_path), eval_size=16, **options)

    first = run()
    assert [step for step, _ in first] == [2, 4]
    assert first == run()
