"""The YAML of a run is read strictly."""

from dataclasses import fields

import pytest
import yaml
from transformers import TrainingArguments

from memzoo.training.config import ConfigError, DataConfig, load_config, parse_config, parse_model
from memzoo.training.trainer import build_model, training_arguments


@pytest.fixture
def write(settings, tmp_path):
    """Writes settings to a file and loads them with overrides."""

    def load(*overrides, text=None, **sections):
        path = tmp_path / "run.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(settings(**sections)))
        return load_config(str(path), overrides)

    return load


def test_overrides_are_yaml_and_win(write):
    config = write(
        "training.max_steps=10", "training.learning_rate=1e-3", "model.hidden_size=24", "sample.prompts=[a, b]"
    )
    assert config.training["max_steps"] == 10
    assert config.training["learning_rate"] == 1e-3
    assert config.model["hidden_size"] == 24
    assert config.sample.prompts == ["a", "b"]


def test_no_is_a_string_and_true_a_boolean(write):
    config = write("training.eval_strategy=no", "training.bf16=true")
    assert config.training["eval_strategy"] == "no"
    assert config.training["bf16"] is True


def test_fsdp_is_switched_on_by_true(write):
    """As transformers wants it, though its annotation still says it is a string."""
    assert write("training.fsdp=true", "training.fsdp_config={version: 2}").training["fsdp"] is True


def test_an_int_becomes_a_float_where_a_float_is_due(write):
    value = write("training.learning_rate=1").training["learning_rate"]
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=1", "training.max_step: unknown key; did you mean training.max_steps?"),
        ("training.evaluation_strategy=no", "did you mean training.eval_strategy?"),
        ("model.hiden_size=1", "model.hiden_size: unknown key; did you mean model.hidden_size?"),
        ("data.blok_size=1", "did you mean data.block_size?"),
        ("sample.prompt=a", "did you mean sample.prompts?"),
        ("tokenizer.pretraind=a", "did you mean tokenizer.pretrained?"),
        ("modle.hidden_size=1", "modle: unknown key; did you mean model?"),
        ("training.max_steps=many", "training.max_steps: expected int, got 'many'"),
        ("training.bf16=yes", "training.bf16: expected bool"),
        ("model.hidden_size=big", "model.hidden_size: expected int, got 'big'"),
        ("data.block_size=1.5", "data.block_size: expected int"),
        ("data.block_size=1", "data.block_size: must be at least 2"),
        ("data.eval_fraction=1", "data.eval_fraction: must lie in"),
        ("data.corpus=sotu", "give exactly one of data.corpus, data.path, data.dataset"),
        ("data.path=null", "give exactly one of"),
        ("data.eval_split=test", "data.eval_split: goes with data.dataset"),
        ("data.max_eval_bytes=0", "data.max_eval_bytes: must be positive"),
        ("model.model_type=lama", "did you mean 'llama'?"),
        ("model.pretrained=x", "give model.model_type to start afresh, or model.pretrained"),
        ("training.output_dir=null", "training.output_dir: missing"),
        ("training=3", "is not an override; write it as training.max_steps=10"),
        ("training.max_steps", "is not an override"),
        ("training.max_steps=[1", "is not valid YAML"),
    ],
)
def test_mistakes_are_refused_by_name(write, override, message):
    with pytest.raises(ConfigError, match=r".") as error:
        write(override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sections"),
        ("model: [", "is not valid YAML"),
        ("model: 3\n", "model: expected dict"),
        ("training:\n  seed: 1\n  seed: 2\n", "seed: given twice (line 3)"),
    ],
)
def test_broken_files_are_refused(write, text, message):
    with pytest.raises(ConfigError) as error:
        write(text=text)
    assert message in str(error.value)


def test_other_names_of_model_fields_are_taken(write):
    assert write("model.d_model=24").model["d_model"] == 24
    own = {"model_type": "neural_memory_transformer", "update_lmm_at_test_time": False}
    run = parse_config({"model": own, "data": {"path": "texts"}, "training": {"output_dir": "out"}})
    assert build_model(run, 264, 0).config.memory_update == "train"
    own = {"model_type": "titan_mac", "num_hidden_layers": 1, "memory_rank_ratio": 0.5, "use_dmgd": False}
    run = parse_config({"model": own, "data": {"path": "texts"}, "training": {"output_dir": "out"}})
    assert build_model(run, 264, 0).config.memory_bank_dim == 320
    with pytest.raises(ConfigError, match=r"model\.update_lmm_at_test_time: expected bool, got 'no'"):
        parse_model({"model_type": "neural_memory_transformer", "update_lmm_at_test_time": "no"})


def test_every_training_argument_is_taken(settings):
    known = {f.name for f in fields(TrainingArguments) if f.init}
    assert {"max_steps", "lr_scheduler_type", "gradient_accumulation_steps", "bf16"} <= known
    config = parse_config(settings(training={"lr_scheduler_type": "cosine", "warmup_steps": 0.1}))
    assert training_arguments(config.training).lr_scheduler_type == "cosine"


def test_a_value_that_training_arguments_refuse_is_a_config_error(run_config):
    with pytest.raises(ConfigError, match=r"training: .*steps"):
        training_arguments(run_config(training={"eval_strategy": "sometimes"}).training)


def test_every_data_field_is_recorded(run_config):
    assert set(run_config().to_dict()["data"]) == {f.name for f in fields(DataConfig)}
