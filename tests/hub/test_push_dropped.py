"""Connections that break in the middle of an upload: tried again, and nothing is half visible, whatever broke."""

import huggingface_hub
import minihub
import pytest
import torch
from safetensors.torch import save_file

from memzoo import MaruForCausalLM, MemoryCache
from memzoo.cli import main
from memzoo.hub_cards.push import pull, push
from memzoo.modeling.publish import publish

IDS = torch.arange(3, 30)[None]
COMMIT = r"POST /api/models/.*/commit/.*"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@torch.no_grad()
@pytest.mark.parametrize(
    ("hub", "at"),
    [("lfs", r"PUT /lfs/.*"), ("xet", r"POST /cas/.*/xorbs/.*"), ("xet", r"POST /cas/.*/shards")]
    + [("lfs", COMMIT), ("xet", COMMIT)],
    indirect=["hub"],
)
def test_it_is_tried_again(hub, model, tmp_path, at):
    hub.drop_at, hub.drop = at, 2
    push(tmp_path / "model", "tester/maru")
    assert hub.drop == 0
    assert len(hub.repos["tester/maru"]["commits"]) == 2  # the first, empty one and that of the upload
    assert hub.xet == ("xet" in hub.files("tester/maru")["model.safetensors"])
    loaded = MaruForCausalLM.from_pretrained(pull("tester/maru", tmp_path / "pulled")).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("at", [minihub.UPLOADS, COMMIT], ids=["content", "commit"])
def test_nothing_is_visible_when_it_stays_broken(hub, model, tmp_path, at, capsys):
    hub.drop_at, hub.drop = at, 1000
    with pytest.raises(ConnectionError, match=r"broke .*nothing is half visible, run the same again"):
        push(tmp_path / "model", "tester/maru")
    assert hub.drop <= 1000 - 5  # that often it was tried
    assert not hub.files("tester/maru")
    assert main(["push", str(tmp_path / "model"), "tester/maru"]) == 2
    assert "run the same again" in capsys.readouterr().err
    hub.drop = 0
    push(tmp_path / "model", "tester/maru")
    assert "model.safetensors" in hub.files("tester/maru")


def test_a_new_version_is_all_old_or_all_new(hub, model, tmp_path):
    push(tmp_path / "model", "tester/maru")
    before = hub.files("tester/maru")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.config.memory_router_temperature = 2.0
    model.save_pretrained(tmp_path / "model")
    hub.drop = 1000
    with pytest.raises(ConnectionError):
        push(tmp_path / "model", "tester/maru")
    assert hub.files("tester/maru") == before
    hub.drop = 0
    push(tmp_path / "model", "tester/maru")
    after = hub.files("tester/maru")
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors", "config.json", "README.md"}


def test_an_answer_that_is_lost_makes_no_second_commit(hub, model, tmp_path, monkeypatch):
    """The commit arrives, its answer does not: the next try sees that all is there."""
    commit, lost = huggingface_hub.HfApi.create_commit, []

    def lose_the_first_answer(*args, **kwargs):
        done = commit(*args, **kwargs)
        if not lost:
            lost.append(done)
            raise huggingface_hub.errors.HfHubHTTPError.__bases__[0]("the server disconnected")
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lose_the_first_answer)
    push(tmp_path / "model", "tester/maru")
    assert lost and len(hub.repos["tester/maru"]["commits"]) == 2


def test_many_files_are_one_commit(hub, tmp_path):
    """The client's upload_folder makes several of more than 250."""
    for index in range(300):
        (tmp_path / f"file_{index}.txt").write_text(str(index))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    huggingface_hub.HfApi().create_repo("tester/many")
    publish(tmp_path, "tester/many", "Many files")
    assert len(hub.files("tester/many")) == 301 and len(hub.repos["tester/many"]["commits"]) == 2


def test_memories_are_tried_again_too(hub, model):
    cache = MemoryCache(model.config)
    model(IDS, past_key_values=cache)
    hub.drop = 2
    cache.push_to_hub("tester/memory")
    assert hub.drop == 0 and {"memory.safetensors", "memory.json"} <= hub.files("tester/memory").keys()
