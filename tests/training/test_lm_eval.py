"""`memzoo eval --tasks`: lm-evaluation-harness reads memzoo's models and adapters, offline, tasks in local files."""

import json

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo import MemoryConfig
from memzoo.cli import main
from memzoo.training.config import parse_config
from memzoo.training.trainer import train

FACTS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white"}
SIZES = {"maru": {"hidden_size": 32, "memory_num_slots": 8}, "llama": {"hidden_size": 32, "intermediate_size": 64}}
pytest.importorskip("lm_eval")
from memzoo.training.harness import evaluate_tasks  # noqa: E402 (after the skip)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks: the answer chosen among four, and written out; "night" was never learned."""
    folder = tmp_path_factory.mktemp("tasks")
    colours = list(FACTS.values())
    rows = [
        {"thing": thing, "choices": colours, "answer": colours.index(c), "colour": c} for thing, c in FACTS.items()
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "Q {{thing}} A",
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    choice |= {"doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    answer = {"task": "answer", "output_type": "generate_until", "doc_to_target": " {{colour}}"}
    answer |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False}}
    answer |= {"metric_list": [{"metric": "exact_match", "ignore_case": True}]}
    for task in (choice, answer):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny model that has learned three of the four facts by heart."""
    folders = {}

    def get(settings, family):
        if family not in folders:
            texts = tmp_path_factory.mktemp("texts")
            for number in range(32):
                known = list(FACTS.items())[:3]
                order = torch.randperm(3, generator=torch.Generator().manual_seed(number)).tolist()
                text = "".join(f"Q {known[i][0]} A {known[i][1]}." for i in order)
                (texts / f"{number}.txt").write_text(text)
            folders[family] = tmp_path_factory.mktemp("models") / family
            steps = {"max_steps": 90, "per_device_train_batch_size": 16, "eval_strategy": "no", "save_strategy": "no"}
            steps |= {"output_dir": str(folders[family]), "logging_steps": 50}
            sections = {"data": {"path": str(texts), "eval_fraction": 0.0, "block_size": 64}, "training": steps}
            train(parse_config(settings(family, model=SIZES[family], **sections)))
        return folders[family]

    return get


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def scores(folder, tasks, **options):
    found = evaluate_tasks(str(folder), ["choice", "answer"], str(tasks), **options)["results"]
    return found["choice"]["acc,none"], found["answer"]["exact_match,none"]


@pytest.mark.parametrize("family", ["maru", "llama"])
def test_questions_are_answered_as_they_were_learned(settings, trained, tasks, family):
    """Three of four facts were in the text; "snow" was not, and its colour, "white", appears nowhere."""
    folder = trained(settings, family)
    assert scores(folder, tasks) == (0.75, 0.75)
    assert scores(folder, tasks, batch_size=1, limit=3) == (1.0, 1.0)


def test_an_adapter_is_put_on_its_base(settings, trained, tasks, tmp_path):
    """As a new one it changes nothing; with another output projection it does."""
    base = trained(settings, "llama")
    for name, scale in (("new", 0.0), ("noisy", 300.0)):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MemoryConfig(task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "o_proj" in key and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=scale)
        model.save_pretrained(tmp_path / name)
    assert isinstance(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "new"), PeftModel
    )
    assert scores(tmp_path / "new", tasks) == (0.75, 0.75)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "noisy")
    assert scores(tmp_path / "noisy", tasks)[1] < 0.5


def test_the_command_prints_the_table(settings, trained, tasks, capsys):
    folder = trained(settings, "maru")
    assert main(["eval", str(folder), "--tasks", "choice,answer", "--task-dir", str(tasks)]) == 0
    said = capsys.readouterr().out
    rows = {row.split("|")[1].strip(): row for row in said.splitlines() if row.startswith("|")}
    assert "0.75" in rows["choice"] and "acc" in rows["choice"]
    assert "0.75" in rows["answer"] and "exact_match" in rows["answer"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "chioce", "--task-dir", "{tasks}"], "there is no task 'chioce'; {tasks} has answer, choice"),
        (["--task-dir", "{tasks}"], "--task-dir: say which tasks of {tasks} to run, with --tasks"),
        (["--tasks", "choice", "--task-dir", "./nowhere"], "--task-dir: ./nowhere is not a folder"),
    ],
)
def test_what_cannot_be_run_is_refused(tasks, capsys, argv, message):
    assert main(["eval", "model", *(word.format(tasks=tasks) for word in argv)]) == 2
    assert message.format(tasks=tasks) in capsys.readouterr().err
