"""Pushing and pulling with the Hub's own client against a small server on loopback, with and without Xet."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import memzoo
from memzoo import MaruForCausalLM, MaruTokenizer, MemoryCache
from memzoo.cli import main
from memzoo.hub_cards.checks import UnsafeFolder
from memzoo.hub_cards.push import pull, push

IDS = torch.arange(3, 30)[None]


@torch.no_grad()
def test_a_model_goes_to_the_hub_and_comes_back(hub, model, tmp_path):
    url = push(tmp_path / "model", "tester/maru", license="apache-2.0")
    assert url.startswith(f"{hub.url}/tester/maru/commit/")
    files = hub.files("tester/maru")
    assert {"model.safetensors", "config.json", "README.md", "modeling_maru.py"} <= files.keys()
    assert len(hub.repos["tester/maru"]["commits"]) == 2  # one upload, one commit
    loaded = AutoModelForCausalLM.from_pretrained("tester/maru").eval()
    assert type(loaded) is MaruForCausalLM and torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert isinstance(AutoTokenizer.from_pretrained("tester/maru"), MaruTokenizer)
    folder = pull("tester/maru", tmp_path / "pulled")
    assert not list(folder.glob("*.py")) and (folder / "README.md").is_file()
    assert torch.equal(MaruForCausalLM.from_pretrained(folder).eval()(IDS).logits, model(IDS).logits)
    with pytest.raises(FileExistsError, match="is not empty"):
        pull("tester/maru", folder)


@torch.no_grad()
def test_the_libraries_own_push_to_hub_works(hub, model, tmp_path):
    model.push_to_hub("tester/plain")
    MaruTokenizer().push_to_hub("tester/plain")
    loaded = AutoModelForCausalLM.from_pretrained("tester/plain").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    text = "a text, čau"
    assert AutoTokenizer.from_pretrained("tester/plain")(text) == MaruTokenizer()(text)
    model.push_to_hub("tester/plain", revision="v2", private=True)
    assert "model.safetensors" in hub.files("tester/plain", "v2")
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id="tester/run", use_cpu=True, push_to_hub=False)
    Trainer(model, arguments, processing_class=MaruTokenizer()).push_to_hub()
    assert {"model.safetensors", "config.json", "README.md"} <= hub.files("tester/run").keys()
    trained = AutoModelForCausalLM.from_pretrained("tester/run").eval()
    assert torch.equal(trained(IDS).logits, model.eval()(IDS).logits)


@torch.no_grad()
def test_a_memory_goes_to_the_hub_and_comes_back(hub, model, tmp_path):
    cache = MemoryCache(model.config)
    model(IDS, past_key_values=cache)
    cache.push_to_hub("tester/memory", revision="chapter-2")
    folder = pull("tester/memory", tmp_path / "memory", revision="chapter-2")
    loaded = MemoryCache.from_pretrained(folder, model.config)
    assert all(torch.equal(loaded.states[name], state) for name, state in cache.states.items())
    assert not hub.files("tester/memory")  # nothing on main
    assert main(["push", str(folder), "tester/again"]) == 0
    assert main(["pull", "tester/again", str(tmp_path / "again")]) == 0
    again = MemoryCache.from_pretrained(tmp_path / "again", model.config)
    assert all(torch.equal(again.states[name], state) for name, state in cache.states.items())


def test_private_repositories_need_the_owners_token(hub, model, tmp_path, monkeypatch):
    push(tmp_path / "model", "tester/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(RepositoryNotFoundError):
        pull("tester/secret", tmp_path / "stolen")
    with pytest.raises(HfHubHTTPError):
        push(tmp_path / "model", "tester/secret")
    assert pull("tester/secret", tmp_path / "mine", token="hf_test")


def test_what_is_unsafe_neither_leaves_nor_arrives(hub, model, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UnsafeFolder):
        push(tmp_path / "model", "tester/bad")
    assert "tester/bad" not in hub.repos
    huggingface_hub.HfApi().create_repo("tester/bad")
    huggingface_hub.HfApi().upload_folder(folder_path=tmp_path / "model", repo_id="tester/bad")
    with pytest.raises(UnsafeFolder):
        pull("tester/bad", tmp_path / "arrived")
    assert not (tmp_path / "arrived").exists()


def test_the_commands(hub, model, tmp_path, capsys):
    assert main(["push", str(tmp_path / "model"), "tester/maru", "--license", "mit", "--no-code"]) == 0
    assert f"{hub.url}/tester/maru" in capsys.readouterr().out
    assert not any(name.endswith(".py") for name in hub.files("tester/maru"))
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert main(["pull", "tester/maru", str(tmp_path / "again")]) == 0
    assert memzoo.MaruConfig.from_pretrained(tmp_path / "again").memory_num_slots == 8
    assert main(["pull", "tester/nothing", str(tmp_path / "none")]) == 2
    assert "tester/nothing" in capsys.readouterr().err
