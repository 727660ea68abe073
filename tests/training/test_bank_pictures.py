"""What is drawn is what was read: attention against the layer's own output; the page needs nothing outside it."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from memzoo import MaruTokenizer, MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryConfig
from memzoo.cli import main
from memzoo.modeling.memory_bank import MemoryRead
from memzoo.modeling.statistics import record_calls
from memzoo.training.bank_pictures import Reading, plot_router_load, readings, show_bank

pytest.importorskip("matplotlib")
CHAPTERS = {"memory_num_chapters": 6, "memory_top_k_chapters": 2, "memory_num_shared_chapters": 1}
TEXT = "a <b>fox</b> </script> costs $5\nmore"


def model_with(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "memory_num_tokens": 24, "initializer_range": 0.4, "memory_init_std": 0.5}
    config = MemoryBankTransformerConfig(**sizes, memory_zero_init=False, **{"memory_num_heads": 1, **fields})
    return MemoryBankTransformerForCausalLM(config).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        CHAPTERS,
        {**CHAPTERS, "memory_mixing": "separate", "memory_routed_scaling_factor": 0.5},
        {**CHAPTERS, "memory_routing": "block", "memory_block_size": 4, "memory_normalize_weights": False},
        {**CHAPTERS, "memory_num_shared_chapters": 0, "memory_product_keys": True, "memory_quantization": "int8"},
        {"memory_bank_type": "factorized", "memory_bank_rank": 8},
        {"memory_bank_type": "reduced", "memory_bank_rank": 8},
    ],
)
def test_the_attention_that_is_drawn_gives_what_the_layer_read(fields):
    """With one head, attention times the memory tokens, through W_v and W_o, is the layer's output."""
    model = model_with(memory_placement="every_n", memory_placement_k=2, **fields)
    ids = torch.randint(3, 264, (11,), generator=torch.Generator().manual_seed(1))
    found, bank = readings(model, ids), model.model.memory_banks[0]
    assert [reading.name for reading in found] == ["layer 0", "layer 2"]
    reads = model.reads()
    with record_calls(reads) as calls:
        model(input_ids=ids[None], use_cache=False)
    for reading, read in zip(found, reads):
        expected = reading.attention @ bank.tokens().detach() @ read.v_proj.weight.mT @ read.o_proj.weight.mT
        torch.testing.assert_close(calls[read][0][1][0][0], expected, rtol=1e-4, atol=1e-5)
        if reading.num_chapters == 1:
            continue
        shared = reading.num_shared
        for t, row in enumerate(reading.chosen.tolist()):
            seen = set(reading.load[t].nonzero()[:, 0].tolist())
            assert seen == set(range(shared)) | {c for c in row if c >= 0}


def test_the_attention_of_an_adapter_is_to_its_input_after_the_norm():
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, initializer_range=0.4))
    chapters = {"num_memory_tokens": 24, "num_chapters": 6, "top_k_chapters": 2, "num_heads": 1}
    model = get_peft_model(base, MemoryConfig(task_type="CAUSAL_LM", init_weights=False, **chapters)).eval()
    ids = torch.randint(3, 264, (11,))
    reads = [module for module in model.modules() if isinstance(module, MemoryRead)]
    with record_calls(reads) as calls:
        model(input_ids=ids[None], use_cache=False)
    for reading, read in zip(readings(model, ids), reads, strict=True):
        ((_, bank, *_), (read_out, *_)) = calls[read][0]
        expected = reading.attention @ bank.tokens() @ read.v_proj.weight.mT @ read.o_proj.weight.mT
        torch.testing.assert_close(read_out[0], expected, rtol=1e-4, atol=1e-5)


def test_memory_tokens_in_use_are_those_that_the_text_reads():
    def in_use(attention: torch.Tensor) -> float:
        return Reading("layer 0", attention, attention, torch.empty(len(attention), 0), 0).in_use

    assert in_use(torch.full((3, 8), 1 / 8)) == pytest.approx(8)
    assert in_use(torch.eye(8)[[0, 0, 5, 5]]) == pytest.approx(2)  # each token reads one, the text two
    assert in_use(2 * torch.eye(8)[[0, 1, 2, 3]]) == pytest.approx(4)  # of separate softmaxes the weights sum to 2
    assert 1 < in_use(torch.tensor([[0.99, 0.01]])) < 1.1


def test_tiers_are_drawn_each_by_itself(tmp_path):
    last = {"memory_num_tokens": 12, "memory_placement": "last_k", "memory_placement_k": 1}
    model = model_with(memory_tiers=[{}, {**CHAPTERS, **last}])
    ids = torch.arange(3, 12)
    found = readings(model, ids)
    assert [reading.name for reading in found] == ["layer 0", "layer 1", "layer 2, read 1", "layer 2, read 2"]
    assert [tuple(reading.load.shape) for reading in found] == [(9, 1)] * 3 + [(9, 6)]
    with record_calls(model.reads()) as calls:
        model(input_ids=ids[None], use_cache=False)
    for reading, read in zip(found, model.reads()):
        bank = calls[read][0][0][1]
        expected = reading.attention @ bank.tokens().detach() @ read.v_proj.weight.mT @ read.o_proj.weight.mT
        torch.testing.assert_close(calls[read][0][1][0][0], expected, rtol=1e-4, atol=1e-5)
    files = show_bank(model, MaruTokenizer(), "abc", tmp_path)  # the first layers have no chapters, the last one has
    assert [file.name for file in files] == ["chapters.png", "attention.png", "bank.html"]


def test_the_command_writes_pictures_and_a_page_that_needs_nothing_else(tmp_path, capsys):
    model_with(**CHAPTERS).save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    logs = [
        {"step": step, **{f"memory/0/{name}": 0.1 * step for name in ("max_load", "min_load", "chapters_used")}}
        for step in (1, 2)
    ]
    (tmp_path / "model" / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert main(["show-bank", str(tmp_path / "model"), "--text", TEXT, "--out", str(tmp_path / "out")]) == 0
    names = ["chapters.png", "attention.png", "router_load.png", "bank.html"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    page = (tmp_path / "out" / "bank.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)|https?://|@import|url\(", page)
    assert page.count("data:image/png;base64,") == 3 and page.count("</script>") == 2
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert "".join(data["tokens"]).replace("\\n", "\n") == "<bos>" + TEXT
    found = readings(model_with(**CHAPTERS), torch.tensor([1, *MaruTokenizer()(TEXT)["input_ids"]]))
    for layer, reading in zip(data["layers"], found):
        assert [parts[0][0] for parts in layer["parts"]] == reading.load.argmax(1).tolist()
    (tmp_path / "model" / "trainer_state.json").unlink()
    assert main(["show-bank", str(tmp_path / "model"), "--text", "", "--out", str(tmp_path / "none")]) == 2
    assert "--text: there is nothing to read" in capsys.readouterr().err


def test_models_without_banks_and_runs_without_routers_have_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="read no memory bank"):
        readings(model_with(memory_placement="none"), torch.arange(3, 9))
    assert not plot_router_load([{"step": 1, "loss": 2.0, "memory/0/activation": 1.0}], tmp_path / "load.png")
    assert not (tmp_path / "load.png").exists()
