"""A folder of results: what is in it, that finished cells are not run again, and what is refused before any work."""

import json
from dataclasses import replace

import pytest

from memzoo.cli import main
from memzoo.training.bench import runner
from memzoo.training.bench.cell import Protocol
from memzoo.training.bench.models import build_config, build_model
from memzoo.training.bench.runner import run_bench
from memzoo.training.bench.specs import Spec, parse_specs
from memzoo.training.bench.suites import FULL_PROTOCOL, full_models, full_tasks
from memzoo.training.config import ConfigError
from memzoo.training.tasks import TASKS as TASKS_BY_NAME
from memzoo.training.tasks import build_task

TASKS = parse_specs(["copy_memory", "vocab_size=4", "num_items=2", "delay=2"], "task")
MODELS = parse_specs(["llama", "maru", "memory_num_banks=0"], "model")
PROTOCOL = Protocol(steps=2, batch_size=4, eval_size=8, eval_lengths=["1x", "3x"], parameters=12_000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two models, two seeds."""
    out = tmp_path_factory.mktemp("bench") / "run"
    run_bench(TASKS, MODELS, [0, 1], PROTOCOL, out, write=lambda line: None)
    return out


@pytest.fixture
def trained(monkeypatch):
    """(model, seed, learning rate) of every cell that is run, by a stand-in whose loss is the learning rate's distance
    to 3e-3."""
    calls = []

    def run_cell(task, spec, seed, rate, protocol, folder, bar):
        calls.append((str(spec), seed, rate))
        evaluations = [{"at": "1x", "length": task.length, "accuracy": 0.5, "exact": 0.25}]
        return {
            "parameters": 1,
            "train_length": task.length,
            "chance": task.chance,
            "train_loss": abs(rate - 3e-3) if rate < 1 else float("nan"),
            "losses": [],
            "accuracies": [],
            "evaluations": evaluations,
            "tokens_per_second": None,
            "peak_memory_mb": None,
            "state_bytes": {"7": 10, "28": 10},
        }

    monkeypatch.setattr(runner, "run_cell", run_cell)
    return calls


def silent(line):
    pass


def test_a_run_writes_its_cells_tables_and_pictures(finished):
    results = json.loads((finished / "results.json").read_text())
    assert len(results["cells"]) == 4
    for cell in results["cells"]:
        assert [place["length"] for place in cell["evaluations"]] == [7, 21]
        assert all(0 <= place["exact"] <= place["accuracy"] <= 1 for place in cell["evaluations"])
        assert [step for step, _ in cell["losses"]] == [1, 2]
        assert abs(cell["parameters"] - 12_000) <= 600
        assert cell["tokens_per_second"] > 0 and cell["seconds"] > 0
    states = {cell["model"]: cell["state_bytes"] for cell in results["cells"]}
    assert states["llama"]["28"] == 4 * states["llama"]["7"]
    assert len(set(states["maru memory_num_banks=0"].values())) == 1
    table = (finished / "results.md").read_text()
    assert "| llama | " in table and "| maru memory_num_banks=0 | " in table and "| 7 tokens | 21 tokens |" in table
    pictures = sorted(path.name for path in finished.glob("*.png"))
    assert [name.rsplit("_", 1)[1] for name in pictures] == ["length.png", "training.png"]
    assert all((finished / name).stat().st_size > 10_000 for name in pictures)


def test_a_cell_depends_on_its_seed_alone(finished, tmp_path):
    alone = run_bench(TASKS, MODELS[:1], [1], PROTOCOL, tmp_path, write=silent)["cells"][0]
    (before,) = [
        cell
        for cell in json.loads((finished / "results.json").read_text())["cells"]
        if (cell["model"], cell["seed"]) == ("llama", 1)
    ]
    assert alone["losses"] == [tuple(point) for point in before["losses"]]
    assert alone["evaluations"] == before["evaluations"]


def test_finished_cells_are_not_run_again(trained, tmp_path):
    run_bench(TASKS, MODELS[:1], [0], PROTOCOL, tmp_path, write=silent)
    run_bench(TASKS, MODELS, [0, 1], PROTOCOL, tmp_path, write=silent)
    assert [call[:2] for call in trained] == [
        ("llama", 0),
        ("llama", 1),
        ("maru memory_num_banks=0", 0),
        ("maru memory_num_banks=0", 1),
    ]


def test_a_run_that_was_stopped_goes_on(trained, tmp_path, monkeypatch):
    run_cell = runner.run_cell

    def stopped(task, spec, seed, *rest):
        if seed == 1:
            raise KeyboardInterrupt
        return run_cell(task, spec, seed, *rest)

    monkeypatch.setattr(runner, "run_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_bench(TASKS, MODELS[:1], [0, 1, 2], PROTOCOL, tmp_path, write=silent)
    monkeypatch.setattr(runner, "run_cell", run_cell)
    run_bench(TASKS, MODELS[:1], [0, 1, 2], PROTOCOL, tmp_path, write=silent)
    assert [seed for _, seed, _ in trained] == [0, 1, 2]


def test_the_learning_rate_is_chosen_on_the_first_seed(trained, tmp_path):
    said = []
    protocol = replace(PROTOCOL, learning_rates=[1e-3, 3e-3, 10.0])
    run_bench(TASKS, MODELS[:1], [0, 1], protocol, tmp_path, write=said.append)
    assert [call[1:] for call in trained] == [(0, 1e-3), (0, 3e-3), (0, 10.0), (1, 3e-3)]
    assert any("learning rate 0.003 has the lowest training loss of seed 0" in line for line in said)
    (row,) = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| llama")]
    assert row.startswith("| llama | 1 | 2 | 0.003 | ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 3}, "steps=2, not 3"),
        ({"learning_rates": [1e-3]}, r"learning_rates=\[0.003\], not \[0.001\]"),
        ({"eval_lengths": ["1x"]}, "eval_lengths="),
        ({"parameters": 9_000}, "parameters=12000, not 9000"),
    ],
)
def test_results_of_another_run_are_refused(finished, trained, changed, message):
    with pytest.raises(ConfigError, match=message):
        run_bench(TASKS, MODELS, [0, 1, 2], replace(PROTOCOL, **changed), finished, write=silent)
    assert not trained


def test_what_cannot_run_is_refused_before_any_work(trained, tmp_path):
    for words, protocol, message in (
        ("copy_memory num_items=0", PROTOCOL, "num_items=0"),
        ("copy_memory", replace(PROTOCOL, eval_lengths=["5"]), "num_items=10 takes at least 21 tokens, not 5"),
        ("copy_memory", replace(PROTOCOL, batch_size=0), "--batch-size: 0"),
        ("copy_memory", replace(PROTOCOL, learning_rates=[0.0]), "--lr"),
        ("copy_memory", replace(PROTOCOL, steps=0, learning_rates=[1e-3, 1e-2]), "--steps: 0"),
        ("copy_memory", replace(PROTOCOL, parameters=10), "nearest to 10 parameters"),
        ("arithmetic digits=2", replace(PROTOCOL, eval_lengths=["1x"], eval_size=600), "below the 600"),
        ("copy_memory", replace(PROTOCOL, eval_depths=[0.5]), "--eval-depths: copy_memory has no depth"),
    ):
        with pytest.raises(ValueError, match=message):
            run_bench(parse_specs(words.split(), "task"), MODELS, [0], protocol, tmp_path / "new", write=silent)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(ConfigError, match="not a file of results"):
        run_bench(TASKS, MODELS, [0], PROTOCOL, tmp_path, write=silent)
    assert not trained and not (tmp_path / "new").exists()


def test_the_command(trained, tmp_path, capsys):
    words = ["--task", "copy_memory", "delay=3", "--model", "llama", "--seeds", "2", "--lr", "1e-3", "--out"]
    assert main(["bench", *words, str(tmp_path)]) == 0
    assert trained == [("llama", 0, 1e-3), ("llama", 1, 1e-3)]
    assert "## copy_memory delay=3" in capsys.readouterr().out
    for wrong, message in (
        (["--task", "copy_memory"], "--out: missing"),
        (["--task", "copy", "--out", "x"], "copy: unknown key"),
        (["--task", "copy_memory", "--model", "lama", "--out", "x"], "did you mean 'llama'"),
    ):
        assert main(["bench", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_full_set_can_be_built(trained, tmp_path):
    tasks, models = full_tasks(), full_models()
    run_bench(tasks, models, [0], FULL_PROTOCOL, tmp_path, write=silent)
    assert len(trained) == len(tasks) * len(models) == 72


def test_a_model_of_a_folder_is_measured_without_training(tmp_path):
    task = build_task("copy_memory", TASKS[0].overrides)
    (spec,) = MODELS[:1]
    model = build_model(spec, build_config(spec, task, 8_000, longest=21), seed=0)
    model.save_pretrained(tmp_path / "model")
    folder = [Spec(str(tmp_path / "model"))]
    (cell,) = run_bench(TASKS, folder, [0], replace(PROTOCOL, steps=0), tmp_path / "out", write=silent)["cells"]
    assert cell["parameters"] == model.num_parameters()
    assert cell["losses"] == [] and [place["at"] for place in cell["evaluations"]] == ["1x", "3x"]


@pytest.mark.slow
def test_sanity_says_that_everything_runs(capsys):
    assert main(["bench", "--sanity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("answers follow from what stands before them" in line for line in lines) == len(TASKS_BY_NAME)
    assert "models run" in lines[-1]
