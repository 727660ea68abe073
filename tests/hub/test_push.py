"""Pushing and pulling with the Hub's own client against a small server on loopback, with and without Xet."""

import importlib
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import memzoo
from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer, MemoryCache
from memzoo.cli import main
from memzoo.hub_cards.checks import UnsafeFolder
from memzoo.hub_cards.push import pull, push

sys.path.insert(0, str(Path(__file__).parent))
minihub = importlib.import_module("minihub")
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = minihub.Hub(tmp_path_factory.mktemp("hub"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["lfs", "xet"])
def hub(request, server, tmp_path, monkeypatch):
    """An empty Hub, and a client that talks to it: its addresses are constants of huggingface_hub."""
    server.forget()
    server.drop, server.xet = 0, tmp_path / "xet" if request.param == "xet" else None
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_XET_CACHE": str(tmp_path / "xet-cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": request.param != "xet",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return server


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = MaruForCausalLM(MaruConfig(hidden_size=16, num_hidden_layers=1, memory_num_slots=8)).eval()
    model.save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    return model


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
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id="tester/run", use_cpu=True, push_to_hub=False)
    Trainer(model, arguments, processing_class=MaruTokenizer()).push_to_hub()
    assert {"model.safetensors", "config.json", "README.md"} <= hub.files("tester/run").keys()


@torch.no_grad()
def test_a_memory_goes_to_the_hub_and_comes_back(hub, model, tmp_path):
    cache = MemoryCache(model.config)
    model(IDS, past_key_values=cache)
    cache.push_to_hub("tester/memory", revision="chapter-2")
    folder = pull("tester/memory", tmp_path / "memory", revision="chapter-2")
    loaded = MemoryCache.from_pretrained(folder, model.config)
    assert all(torch.equal(loaded.states[name], state) for name, state in cache.states.items())
    assert not hub.files("tester/memory")  # nothing on main


def test_private_repositories_need_the_owners_token(hub, model, tmp_path, monkeypatch):
    push(tmp_path / "model", "tester/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(RepositoryNotFoundError):
        pull("tester/secret", tmp_path / "stolen")
    with pytest.raises(HfHubHTTPError):
        push(tmp_path / "model", "tester/secret")
    assert pull("tester/secret", tmp_path / "mine", token="hf_test")


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)  # here the Xet client writes to a folder, without a connection
def test_an_upload_that_breaks_off_is_repeated_and_nothing_is_half_visible(hub, model, tmp_path, monkeypatch):
    hub.drop = 2
    push(tmp_path / "model", "tester/maru")
    assert hub.drop == 0 and "model.safetensors" in hub.files("tester/maru")
    hub.forget()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop = 1000
    with pytest.raises(ConnectionError, match="run the same again"):
        push(tmp_path / "model", "tester/broken")
    assert not hub.files("tester/broken")
    hub.drop = 0
    push(tmp_path / "model", "tester/broken")
    assert "model.safetensors" in hub.files("tester/broken")


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
