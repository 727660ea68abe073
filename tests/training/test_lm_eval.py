"""lm-evaluation-harness reads memzoo's models as any other, offline, with a task in a local file."""

import json

import pytest
import yaml

import memzoo  # noqa: F401 (registers the families)
from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.trainer import build_model

lm_eval = pytest.importorskip("lm_eval")


@pytest.mark.parametrize("family", ["maru", "llama"])
def test_a_local_multiple_choice_task(run_config, tmp_path, monkeypatch, family):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "The sky is", "choices": ["blue", "loud"], "answer": 0} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    folder = tmp_path / "model"
    tokenizer = MaruTokenizer()
    build_model(run_config(family), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu"},
        tasks=["colours"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["colours"]["acc,none"] in (0.0, 1.0)  # three times the same question
    assert found["n-samples"]["colours"]["original"] == 3
