"""Model cards: what a run left in its folder is on the card, and the Hub's client accepts its metadata."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, LlamaConfig

import memzoo
from memzoo import MaruConfig, MaruForCausalLM
from memzoo.hub_cards.card import render_card

RUN = {"model": {"model_type": "maru", "hidden_size": 16}, "data": {"corpus": "sotu"}, "training": {"max_steps": 7}}
LOG = [{"loss": 3.0}, {"eval_bits_per_byte": 2.9}, {"eval_bits_per_byte": 2.71828, "eval_loss": 1.8841}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny-maru"
    MaruForCausalLM(MaruConfig(hidden_size=16, memory_num_slots=7)).save_pretrained(folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    (folder / "loss.png").write_bytes(b"")
    return folder


def test_what_the_run_left_is_on_the_card(folder, tmp_path):
    card = render_card(folder, license="apache-2.0")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "transformers" and loaded.data.pipeline_tag == "text-generation"
    assert loaded.data.license == "apache-2.0" and {"memzoo", "maru"} <= set(loaded.data.tags)
    results = {result.metric_type: result.metric_value for result in loaded.data.eval_results}
    assert results == {"bits_per_byte": 2.7183, "loss": 1.8841}
    parameters = sum(x.numel() for x in MaruForCausalLM.from_pretrained(folder).state_dict().values())
    for part in (
        f"{parameters:,}",
        "`memory_num_slots` | `7`",
        "2.718",
        "max_steps: 7",
        "loss.png",
        "State of the Union",
    ):
        assert part in loaded.text, part
    assert "trust_remote_code" not in loaded.text


def test_without_a_run_there_is_no_training_section(tmp_path):
    MaruForCausalLM(MaruConfig(hidden_size=16)).save_pretrained(tmp_path)
    text = render_card(tmp_path).text
    assert "## Training" not in text and "## Results" not in text and "No licence was given" in text


def test_other_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor adapter_config"):
        render_card(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no card for 'llama'"):
        render_card(tmp_path)


def test_every_family_has_a_card_of_its_own(tmp_path):
    for model_type in memzoo._FAMILIES:
        folder = tmp_path / model_type
        AutoConfig.for_model(model_type, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
        text = render_card(folder).text
        assert all(f"## {part}" in text for part in ("Use", "Limits", "Licence and citation"))
        assert "memory" in text and "arXiv" in text
