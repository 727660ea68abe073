"""Folders that are unsafe or not whole are refused, each with a message that says what to do."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from memzoo import MaruConfig, MaruForCausalLM, MemoryCache
from memzoo.hub_cards.checks import UnsafeFolder, check_folder


@pytest.fixture
def folder(tmp_path):
    model = MaruForCausalLM(MaruConfig(hidden_size=16, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    check_folder(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pickled_weights(folder):
    torch.save({}, folder / "pytorch_model.bin")


def pickle_under_another_name(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0] * 100}))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def oversized(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")


def tampered_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(bytes(data))


def link_out(folder):
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(folder.parent / "secret.txt")


def index_out(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def index_of_missing_file(folder):
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_class(folder):
    edit(folder / "config.json", architectures=["LlamaForCausalLM"])


def other_code(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "somebody/else--modeling.MaruForCausalLM"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled_weights, r"pytorch_model\.bin may run code"),
        (pickle_under_another_name, "not a safetensors file"),
        (cut_short, "cut short"),
        (oversized, "cut short, changed"),
        (tampered_header, "cut short, changed"),
        (link_out, "leads out of"),
        (index_out, r"'\.\./model\.safetensors', which is not a file beside it"),
        (index_of_missing_file, "which is missing"),
        (other_class, "'LlamaForCausalLM' for model_type 'maru'"),
        (other_code, "not code of this family"),
    ],
)
def test_unsafe_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UnsafeFolder, match=message):
        check_folder(folder)


def test_memories_pass_and_empty_folders_do_not(folder, tmp_path):
    model = MaruForCausalLM.from_pretrained(folder)
    cache = MemoryCache(model.config)
    model(torch.tensor([[5, 6]]), past_key_values=cache)
    cache.save_pretrained(tmp_path / "memory")
    check_folder(tmp_path / "memory")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        check_folder(tmp_path / "empty")
    save_file({}, tmp_path / "empty" / "other.safetensors")
    check_folder(tmp_path / "empty")
