"""Problems have the answers that Python gives, no test problem is trained on, and answers are counted right."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, EvalPrediction

from memzoo.training.config import ConfigError
from memzoo.training.evaluate import greedy_answers
from memzoo.training.tasks import build_task
from memzoo.training.tasks.arithmetic import TOKENIZER, ArithmeticTask
from memzoo.training.tasks.common import IGNORED, TaskDataset, accuracy, answers
from memzoo.training.trainer import train

SETTINGS = [
    {},
    {"digits": 3, "reverse_answer": True, "pad_operands": True},
    {"operations": "+-*", "num_operands": 4},
    {"operations": "-", "digits": 3, "reverse_answer": True},
    {"operations": "+-", "digits": 1, "num_operands": 2, "num_steps": 4},
    {"operations": "*", "digits": 2, "num_steps": 3},
]


def texts(task, size=200, seed=0):
    """(question, answer) of each row, read back from the tokens; what is after the answer is its end and pads."""
    for ids, labels in zip(*task.sample(size, seed), strict=True):
        asked = labels != IGNORED
        assert torch.equal(labels[asked], ids[asked])
        start, stop = int(asked.nonzero()[0]), int(asked.nonzero()[-1])
        assert asked[start : stop + 1].all() and ids[0] == TOKENIZER.bos_token_id
        assert ids[stop] == TOKENIZER.eos_token_id and (ids[stop + 1 :] == TOKENIZER.pad_token_id).all()
        assert task.question(ids, labels) == TOKENIZER.decode(ids[1:start])
        yield TOKENIZER.decode(ids[1:start]), TOKENIZER.decode(ids[start:stop])


@pytest.mark.parametrize("settings", SETTINGS)
def test_answers_are_those_of_python(settings):
    task = ArithmeticTask(**settings)
    for question, answer in texts(task):
        *steps, asked = question.removesuffix("=").split(";")
        names: dict[str, int] = {}
        for step in [*steps, f"answer={asked}"]:
            exec(re.sub(r"\b0+(?=\d)", "", step), {}, names)  # Python refuses leading zeros
        assert answer == (str(names["answer"])[::-1] if task.reverse_answer else str(names["answer"]))
        operands = re.findall(r"\d+", question)
        assert len(steps) == (task.num_steps if task.num_steps > 1 else 0)
        assert len(operands) == task.num_operands + task.num_steps - 1
        assert set(re.findall(r"[+*-]", question)) <= set(task.operations)
        assert all(len(x) == task.digits if task.pad_operands else len(x) <= task.digits for x in operands)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_answer_follows_from_what_stands_before_it(settings):
    task = ArithmeticTask(**settings)
    for ids, labels in zip(*(part.tolist() for part in task.sample(20, 1)), strict=True):
        for position, answer in enumerate(labels):
            if answer != IGNORED:
                assert task.solve(ids[:position]) == answer


@pytest.mark.parametrize("settings", [{}, {"num_steps": 2}, {"operations": "*"}])
def test_rows_are_as_long_as_the_longest_problem(settings):
    """Every problem of one digit is drawn, and the longest, such as 9+9=18, fills the row."""
    task = ArithmeticTask(digits=1, test_fraction=0.2, **settings)
    ids, _ = task.sample(2000, 0)
    assert ids.shape == (2000, task.length) and (ids[:, -1] == TOKENIZER.eos_token_id).any()


def canonical(question):
    return "+".join(sorted(question.removesuffix("=").split("+")))


@pytest.mark.parametrize("test_fraction", [0.1, 0.5])
def test_no_problem_is_in_both_splits(test_fraction):
    """Nearly all sums of numbers up to 99 are drawn; 3+4 and 4+3 fall on the same side."""
    task = ArithmeticTask(test_fraction=test_fraction)
    seen = [{canonical(q) for q, _ in texts(part, 2500)} for part in (task, task.held_out())]
    assert not seen[0] & seen[1]
    share = len(seen[1]) / 5050
    assert 0.6 * test_fraction < share < 1.1 * test_fraction  # of which the draws have not seen all


def test_the_seed_decides():
    task = ArithmeticTask()
    assert torch.equal(task.sample(5, 1)[0], task.sample(5, 1)[0])
    assert not torch.equal(task.sample(5, 1)[0], task.sample(5, 2)[0])


def test_longer_problems_have_more_digits():
    task = ArithmeticTask(digits=2)
    longer = task.at_length(20)
    assert longer.digits > 2 and longer.length <= 20 < ArithmeticTask(digits=longer.digits + 1).length
    with pytest.raises(ValueError, match="takes at least 8 tokens, not 7"):
        task.at_length(7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": ""}, "operations='' must be some of"),
        ({"operations": "+/"}, "operations='+/' must be some of"),
        ({"digits": 0}, "has no answer without digits >= 1"),
        ({"digits": 19}, "digits=19 is above 18"),
        ({"num_operands": 1}, "has no answer"),
        ({"num_steps": 27}, "num_steps from 1 to 26"),
        ({"test_fraction": 1.0}, "must lie between 0 and 1"),
        ({"digits": 1}, "about 5 test problems, below the 10 wanted"),
        ({"test_fraction": 0.999}, "about 5 train problems, below the 10 wanted"),
    ],
)
def test_settings_without_an_answer_are_refused(settings, message):
    with pytest.raises(ValueError, match=r".") as error:
        ArithmeticTask(**settings)
    assert message in str(error.value)


TINY = {"path": None, "block_size": 256, "eval_fraction": 0.05, "task": "arithmetic"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "arithmetics"}, "task arithmetics: unknown key; did you mean task arithmetic?"),
        ({"task_kwargs": {"digit": 2}}, "arithmetic.digit: unknown key; did you mean arithmetic.digits?"),
        ({"task_kwargs": {"digits": "two"}}, "arithmetic.digits: expected int"),
        ({"task_kwargs": {"digits": 0}}, "data.task_kwargs: arithmetic has no answer"),
        ({"task_eval_size": 600}, "has about 500 test problems, below the 600 wanted"),
        ({"task_eval_size": 0}, "data.task_eval_size: must be positive"),
        ({"task_size": 0}, "data.task_size: must be positive"),
        ({"block_size": 64}, "data.block_size: goes with a text, not with data.task"),
        ({"task": None, "corpus": "sotu", "task_kwargs": {"digits": 3}}, "data.task_kwargs: goes with data.task"),
    ],
)
def test_settings_of_a_run_that_cannot_be_used_are_refused(run_config, data, message):
    with pytest.raises(ConfigError, match=r".") as error:
        train(run_config(data=TINY | data))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A Llama that has learned some sums of two numbers, and its task."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=264, pad_token_id=0, **config))
    task = ArithmeticTask(digits=1, test_fraction=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        ids, labels = task.sample(64, step)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), task


def test_greedy_decoding_and_teacher_forcing_agree(learned):
    """An answer is right under one exactly if it is under the other: the first wrong token is the same."""
    model, task = learned
    ids, labels = task.sample(100, seed=7)
    with torch.no_grad():
        predicted = answers(model(input_ids=ids).logits, labels)
    forced = ((predicted == labels) | (labels == IGNORED)).all(1).tolist()
    written = greedy_answers(model, task, 100, seed=7, batch_size=32)
    assert [answer.right for answer in written] == forced
    assert 0 < sum(forced) < 100
    metrics = accuracy(EvalPrediction(predicted.numpy(), labels.numpy()))
    assert metrics["exact"] == np.mean(forced) < metrics["accuracy"]
    for answer, (question, expected) in zip(written, texts(task, 100, 7), strict=True):
        assert answer.question == question
        assert (answer.written == expected) == answer.right


def test_a_run_reports_answers_and_its_settings_count(run_config, tmp_path, capsys):
    data = TINY | {"task_kwargs": {"digits": 2, "operations": "+-"}, "task_eval_size": 20, "task_size": 12}
    training = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
    }
    trainer = train(run_config(data=data, sample={"prompts": [""], "max_new_tokens": 100}, training=training))
    assert trainer.state.global_step == 6  # 12 sequences, 4 a step, twice
    logs = [log for log in trainer.state.log_history if "eval_exact" in log]
    assert [log["step"] for log in logs] == [2, 4, 6] and 0 <= logs[-1]["eval_exact"] <= logs[-1]["eval_accuracy"] <= 1
    assert trainer.state.best_metric is not None and trainer.args.greater_is_better
    held_out = trainer.eval_dataset
    assert len(held_out) == 20 and held_out.task == build_task("arithmetic", data["task_kwargs"]).held_out()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
    shown = capsys.readouterr().out
    questions = [held_out.task.question(*row) for row in zip(*held_out.task.sample(3, trainer.args.seed), strict=True)]
    assert all(shown.count("\n" + question) == 3 for question in questions)


def test_new_problems_at_every_step_and_other_tasks(run_config, tmp_path):
    """A task without text has no tokenizer; its vocabulary is the model's."""
    data = TINY | {"task": "copy_memory", "task_kwargs": {"delay": 3, "num_items": 2}}
    config = run_config("llama", data=data, training={"max_steps": 3, "gradient_accumulation_steps": 2})
    trainer = train(config)
    assert len(trainer.train_dataset) == 3 * 2 * 4
    rows = {tuple(row["input_ids"].tolist()) for row in trainer.train_dataset}
    assert len(rows) > 15
    assert trainer.model.config.vocab_size == 10
    assert isinstance(trainer.train_dataset, TaskDataset) and not (tmp_path / "run" / "tokenizer_config.json").exists()
