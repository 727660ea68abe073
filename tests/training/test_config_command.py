"""`memzoo config` explains keys and prints a run in full; `memzoo lr-find` suggests a rate and leaves nothing."""

import math
from pathlib import Path

import pytest
import yaml

from memzoo.cli import main
from memzoo.training.adapt.settings import load_adapt_config, parse_adapt_config
from memzoo.training.config import ConfigError, DataConfig, parse_config
from memzoo.training.explain import SECTIONS_OF_ADAPT, explain, resolve, resolve_file
from memzoo.training.lr_find import Finding, find_learning_rate


@pytest.fixture
def memzoo(capsys):
    """Runs a command; returns exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("key", "kind", "default", "meaning"),
    [
        ("training.learning_rate", "float", "5e-05", "initial learning rate"),
        ("data.block_size", "int", "256", "tokens the model sees at once"),
        ("early_stopping.patience", "int", "5", "without an improvement"),
        ("learning_rates.bank", "float | None", "None", "learned tokens"),
        ("model.maru.memory_num_banks", "int", None, None),
        ("model.maru.num_memories", "int", None, None),
        ("optimizer.period", "int", None, None),
    ],
)
def test_a_key_is_explained(key, kind, default, meaning):
    found = explain(key)[0]
    assert found.type == kind and found.meaning
    assert default is None or found.default == default
    assert meaning is None or meaning in found.meaning


def test_every_key_of_every_section_has_a_meaning():
    for section in ("data", "tokenizer", "sample", "learning_rates", "early_stopping", "training"):
        with pytest.raises(ConfigError, match=f"{section}: a section; its keys are ") as listed:
            explain(section)
        keys = str(listed.value).partition("; its keys for")[0].partition("keys are ")[2].split(", ")
        assert len(keys) > 1
        assert all(explain(f"{section}.{key}")[0].meaning for key in keys)
    assert {e.key.split(".")[1] for e in explain("model.hidden_size")} >= {"maru", "titan_mac", "dual_memory"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.lerning_rate", "did you mean training.learning_rate?"),
        ("trainig.learning_rate", "did you mean training?"),
        ("model.hiden_size", "did you mean model.hidden_size?"),
        ("optimizer.perod", "did you mean optimizer.period?"),
    ],
)
def test_a_key_that_does_not_exist_is_named(memzoo, key, message):
    code, _, error = memzoo("config", "--explain", key)
    assert code == 2 and message in error


def test_what_is_printed_is_a_config_that_gives_the_same_run(memzoo, settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(learning_rates={"bank": 0.1})))
    code, printed, _ = memzoo("config", "--print", tmp_path / "run.yaml", "training.max_steps=3", "data.block_size=64")
    assert code == 0
    full = yaml.safe_load(printed)
    assert full["training"]["max_steps"] == 3 and full["data"]["block_size"] == 64
    assert full["training"]["weight_decay"] == 0.0 and full["data"]["eval_fraction"] == 0.1
    assert full["data"].keys() == DataConfig.__dataclass_fields__.keys()
    assert full["model"]["memory_num_banks"] == 2 and full["model"]["conv_kernel"] == 4
    assert full["learning_rates"] == {"bank": 0.1}
    assert resolve(parse_config(full)) == full


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"eval_strategy": "epoch"}}, "training.eval_steps: goes with training.eval_strategy steps"),
        ({"training": {"save_strategy": "epoch"}}, "training.save_steps: goes with training.save_strategy steps"),
        ({"training": {"eval_strategy": "no", "load_best_model_at_end": True}}, "load_best_model_at_end: needs eval"),
        ({"early_stopping": {"patience": 2}}, "early_stopping: the last model is worse than the best one"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience: must be positive"),
        ({"training": {"metric_for_best_model": "bits_per_bite"}}, "did you mean bits_per_byte?"),
        ({"training": {"metric_for_best_model": "eval_exact"}}, "a text has no metric 'eval_exact'; known here: b"),
        ({"learning_rates": {"memory": -1.0}}, "learning_rates.memory: must not be negative"),
        ({"learning_rates": {"memori": 1.0}}, "did you mean learning_rates.memory?"),
        (
            {"learning_rates": {"memory": 1.0}, "optimizer": {"name": "deep_momentum"}},
            "learning_rates: the optimizer section has groups of its own",
        ),
        (
            {"training": {"fsdp": True}, "optimizer": {"name": "deep_momentum"}},
            "training.fsdp: the optimizers of the section optimizer take whole weights",
        ),
        ({"training": {"lr_scheduler_type": "constant", "warmup_steps": 2}}, "use constant_with_warmup"),
        ({"training": {"lr_scheduler_type": "warmup_stable_decay"}}, "num_decay_steps"),
        (
            {"training": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}}},
            "warmup, stable and decay are 9 steps of 8 in training.max_steps",
        ),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr"),
        ({"training": {"lr_scheduler_kwargs": {"min_lr": 1e-4}}}, "training.lr_scheduler_kwargs: "),
        (
            {"data": {"streaming": True}, "training": {"train_sampling_strategy": "group_by_length"}},
            "training.train_sampling_strategy: a stream has its own order",
        ),
        ({"data": {"streaming": True, "across_documents": True}}, "data.across_documents: goes with a text in memory"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, sections, message):
    with pytest.raises(ConfigError, match=r".") as error:
        resolve(parse_config(settings(**sections)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind", "default", "meaning"),
    [
        ("base.quantization", "Optional[Literal['int8', 'nf4', 'fp4']]", "None", "bitsandbytes"),
        ("memory.num_memory_tokens", "int", "256", "Learned tokens of a bank."),
        ("lora.lora_alpha", "int", "8", "alpha"),
        ("data.max_length", "int", "1024", "conversations are cut to it"),
        ("learning_rates.projections", "float | None", "None", "what reads them"),
    ],
)
def test_a_key_of_adapt_is_explained(key, kind, default, meaning):
    found = explain(key)
    assert [e.key for e in found] == [f"{key} of memzoo adapt"]
    assert (found[0].type, found[0].default) == (kind, default) and meaning in found[0].meaning


def test_a_key_that_train_and_adapt_share_is_explained_for_both():
    assert [e.key for e in explain("data.path")] == ["data.path", "data.path of memzoo adapt"]
    assert (
        "conversations" in explain("data.path")[1].meaning and "conversations" not in explain("data.path")[0].meaning
    )


def test_every_key_of_every_section_of_adapt_has_a_meaning():
    for section in SECTIONS_OF_ADAPT:
        with pytest.raises(ConfigError, match=f"{section}: a section; .*its keys for memzoo adapt are ") as listed:
            explain(section)
        keys = str(listed.value).rpartition("for memzoo adapt are ")[2].split(", ")
        assert len(keys) > 3
        assert all(explain(f"{section}.{key}")[-1].meaning for key in keys)
    with pytest.raises(ConfigError, match=r"memory.plcement: unknown key; did you mean memory.placement\?"):
        explain("memory.plcement")


@pytest.mark.parametrize("name", ["adapter_qwen2.5_1.5b", "adapter_smollm2", "memory_lora_combined"])
def test_the_settings_of_adapt_are_printed_in_full(memzoo, tmp_path, name):
    file = Path(__file__).parents[2] / "training" / "configs" / f"{name}.yaml"
    code, printed, _ = memzoo("config", "--print", file, "training.use_cpu=true", "memory.num_memory_tokens=64")
    assert code == 0 and "&id" not in printed
    full, given = yaml.safe_load(printed), load_adapt_config(str(file))
    assert given.memory.items() - full["memory"].items() == {("num_memory_tokens", given.memory["num_memory_tokens"])}
    assert full["memory"]["num_memory_tokens"] == 64 and full["memory"]["sharing"] == "per_layer"
    assert full["learning_rates"] == given.learning_rates and full["data"]["eval_fraction"] == 0.05
    assert full["training"]["weight_decay"] == 0.0
    assert (full["lora"]["lora_dropout"] == 0.0) if given.lora else (full["lora"] == {})
    (tmp_path / "full.yaml").write_text(printed)
    assert resolve_file(str(tmp_path / "full.yaml")) == full
    assert (
        parse_adapt_config(full).adapter() == load_adapt_config(str(file), ["memory.num_memory_tokens=64"]).adapter()
    )


def test_a_mistake_in_a_file_for_adapt_is_refused_by_name(memzoo, tmp_path):
    (tmp_path / "run.yaml").write_text("base: {name: x}\nmemory: {num_memory_token: 3}\ntraining: {output_dir: y}\n")
    code, _, error = memzoo("config", "--print", tmp_path / "run.yaml")
    assert code == 2 and "did you mean memory.num_memory_tokens?" in error


def test_a_whole_section_is_dropped_by_null(memzoo, settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(learning_rates={"bank": 0.1})))
    _, printed, _ = memzoo("config", "--print", tmp_path / "run.yaml", "learning_rates=null")
    assert yaml.safe_load(printed)["learning_rates"] == {}


def curve(losses):
    return Finding([1e-5 * 10 ** (i / 10) for i in range(len(losses))], losses, losses)


def test_the_suggestions_of_a_known_curve():
    losses = [5 - 3 / (1 + math.exp(-(i - 20) / 2)) + max(0, i - 30) ** 2 / 50 for i in range(40)]
    finding = curve(losses)
    assert finding.steepest == pytest.approx(finding.rates[20])
    assert finding.rates[finding.lowest] == pytest.approx(finding.a_tenth * 10)
    assert 26 <= finding.lowest <= 31


def test_lr_find_suggests_draws_and_leaves_nothing(memzoo, settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings("llama", early_stopping={})))
    png = tmp_path / "curve.png"
    code, said, _ = memzoo("lr-find", tmp_path / "run.yaml", "--steps", 40, "--start", 1e-5, "--end", 10, "--out", png)
    assert code == 0 and said.startswith("learning rate: ")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "run.yaml"]


def test_the_rate_grows_exponentially_and_the_run_ends_when_the_loss_diverges(run_config):
    finding = find_learning_rate(run_config("llama", training={"optim": "sgd"}), 1e-4, 1e6, steps=60)
    growth = [b / a for a, b in zip(finding.rates, finding.rates[1:])]
    assert growth == pytest.approx([1e10 ** (1 / 59)] * len(growth), rel=1e-3)
    assert finding.rates[0] == pytest.approx(1e-4)
    assert 10 <= len(finding.rates) < 60
    assert 1e-4 < finding.steepest <= finding.rates[finding.lowest]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "end": 0.1}, "--start 1 must be above 0 and below --end 0.1"),
        ({"steps": 5}, "--steps 5: a curve needs 10 or more"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(run_config, options, message):
    with pytest.raises(ConfigError, match=message):
        find_learning_rate(run_config(), **options)
