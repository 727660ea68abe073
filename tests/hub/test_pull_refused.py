"""What a Hub should not have sent is refused with the file's name, and nothing of it stays."""

import hashlib
import json
import pickle
import re

import pytest

from memzoo.cli import main
from memzoo.hub_cards.checks import UnsafeFolder
from memzoo.hub_cards.push import pull, push


def replace(hub, path, data):
    """The file in the repository is another one, and the Hub says so."""
    oid, tree = hashlib.sha256(data).hexdigest(), hub.files("tester/maru")
    (hub.root / oid).write_bytes(data)
    tree[path] = {"oid": oid[:40], "size": len(data)} | ({"sha256": oid} if path.endswith(".safetensors") else {})
    if "sha256" not in tree[path]:
        (hub.root / oid[:40]).write_bytes(data)


def on_its_way(hub, change):
    """The Hub's storage gives out other bytes than the Hub says that it has."""
    file = hub.files("tester/maru")["model.safetensors"]
    names = [f"xorb-{t['hash']}" for t in hub.xet_files[file["sha256"]]["terms"]] if hub.xet else [file["sha256"]]
    for path in {hub.root / name for name in names}:
        path.write_bytes(change(path.read_bytes()))


def tampered(hub, folder):
    """One bit of a weight: still a safetensors file, of the right size."""
    on_its_way(hub, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def cut_short(hub, folder):
    on_its_way(hub, lambda data: data[:-100])


def cut_short_before(hub, folder):
    replace(hub, "model.safetensors", (folder / "model.safetensors").read_bytes()[:-100])


def oversized(hub, folder):
    replace(hub, "model.safetensors", (folder / "model.safetensors").read_bytes() + b"more")


def pickled(hub, folder):
    replace(hub, "model.safetensors", pickle.dumps({"weight": [1.0] * 100}))


def path_out(hub, folder):
    replace(hub, "../evil.json", b"{}")


def index_out(hub, folder):
    index = {"weight_map": {"a": "../../model.safetensors"}}
    replace(hub, "model.safetensors.index.json", json.dumps(index).encode())


def other_class(hub, folder):
    config = {**json.loads((folder / "config.json").read_text()), "architectures": ["LlamaForCausalLM"]}
    replace(hub, "config.json", json.dumps(config).encode())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (tampered, UnsafeFolder, r"model\.safetensors was changed on its way"),
        (cut_short, OSError, "Consistency check failed: file should be of size|the connection to the Hub broke"),
        (cut_short_before, UnsafeFolder, r"model\.safetensors is cut short"),
        (oversized, UnsafeFolder, r"model\.safetensors is cut short, changed"),
        (pickled, UnsafeFolder, "not a safetensors file"),
        (path_out, ValueError, "evil"),
        (index_out, UnsafeFolder, "which is not a file beside it"),
        (other_class, UnsafeFolder, "'LlamaForCausalLM' for model_type 'maru'"),
    ],
)
def test_it_is_refused_and_removed(hub, model, tmp_path, damage, error, message, capsys):
    push(tmp_path / "model", "tester/maru")
    damage(hub, tmp_path / "model")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        pull("tester/maru", tmp_path / "arrived")
    caches = [tmp_path / "cache", tmp_path / "xet-cache"]
    assert not {path for path in set(tmp_path.rglob("*")) - before if not {path, *path.parents} & set(caches)}
    assert main(["pull", "tester/maru", str(tmp_path / "arrived")]) == 2
    assert re.search(message, capsys.readouterr().err)
