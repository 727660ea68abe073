"""A Hub on loopback, with and without Xet, and the real client that talks to it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer

sys.path.insert(0, str(Path(__file__).parent))
loopback = importlib.import_module("loopback")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with loopback.serve(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(params=["lfs", "xet"])
def hub(request, server, tmp_path, monkeypatch):
    """An empty Hub, and a client that talks to it."""
    server.forget()
    loopback.point_client_at(server, tmp_path, monkeypatch, xet=request.param == "xet")
    return server


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = MaruForCausalLM(MaruConfig(hidden_size=16, num_hidden_layers=1, memory_num_slots=8)).eval()
    model.save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    return model
