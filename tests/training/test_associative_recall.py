"""The layout of the recall task; what all tasks have in common is in test_tasks.py."""

import pytest

from memzoo.training.tasks.associative_recall import AssociativeRecallTask, RecallTask
from memzoo.training.tasks.common import IGNORED


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (4, 2, 8, 3), (6, 6, 6, 9)])
def test_every_answer_follows_from_exactly_one_pair(gap, sizes):
    task = RecallTask(*sizes, gap=gap)
    ids, labels = task.sample(50, seed=3)
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


def test_a_single_query_is_the_case_of_one():
    assert (AssociativeRecallTask().sample(9, 4)[0] == RecallTask(num_queries=1).sample(9, 4)[0]).all()
