"""Banks: kinds, quantization, what a read caches, projects and refuses."""

import copy
import pickle

import pytest
import torch

from memzoo.modeling.memory_bank import MemoryBank, MemoryRead
from memzoo.modeling.quantized_bank import dequantize, fake_quantize, quantization_error, quantize

CHAPTERS = {"top_k_chapters": 2, "num_shared_chapters": 1}


def build(bank_type="standard", num_chapters=1, quantization=None, aware=False, **options):
    torch.manual_seed(0)
    bank = MemoryBank(24, 8, bank_type, None if bank_type == "standard" else 4, num_chapters, quantization, aware)
    options = {"num_kv_heads": 2, "zero_init": False, **options}
    read = MemoryRead(12, bank.width, 4, num_chapters=num_chapters, **options)
    read.init_weights(0.4)
    if read.router is not None:
        read.router.init_weights(0.4)
    bank.init_weights(0.7)
    return bank.double(), read.double().eval()


def by_hand(bank, read, x):
    """The whole bank, from its expanded tokens and full matrices."""
    q = (x @ read.q_proj.weight.mT).unflatten(-1, (4, -1)).transpose(1, 2)
    k, v = ((bank.tokens() @ p.weight.mT).unflatten(-1, (2, -1)).transpose(0, 1) for p in (read.k_proj, read.v_proj))
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ read.o_proj.weight.mT


def record_rows(bank, monkeypatch):
    """How many rows are expanded at each call."""
    asked, rows = [], bank.rows
    monkeypatch.setattr(bank, "rows", lambda at: asked.append(at.stop - at.start) or rows(at))
    return asked


@pytest.mark.parametrize("projection_rank", [None, 3])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("bank_type", ["standard", "factorized", "reduced"])
def test_a_read_of_every_kind_of_bank(bank_type, quantization, projection_rank):
    bank, read = build(bank_type, projection_rank=projection_rank)
    if quantization:
        bank = bank.quantize(quantization).double()
    assert bank.width == (4 if bank_type == "reduced" else 8)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = by_hand(bank, read, x)
    y, state, logits = read(x, bank, {})
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert state == {} and logits is None
    with torch.no_grad():  # few tokens and many, which quantized banks read in different ways
        torch.testing.assert_close(read(x, bank, {})[0], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(read(x[:, :1], bank, {})[0], expected[:, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_quantized_bank_is_never_expanded(quantization, tokens, monkeypatch):
    for num_chapters, options in ((1, {}), (8, CHAPTERS)):
        bank, read = build(num_chapters=num_chapters, **options)
        bank = bank.quantize(quantization).double()
        if num_chapters == 1:
            bank, wide = MemoryBank(1024, 8).quantize(quantization).double(), 256
        else:
            wide = 3  # a chapter
        asked = record_rows(bank, monkeypatch)
        x = torch.randn(1, tokens, 12, dtype=torch.float64)
        with torch.no_grad():
            y = read(x, bank, {})[0]
        assert max(asked) == wide and len(asked) >= 2
        if num_chapters > 1 and tokens == 1:
            assert len(asked) == 3  # two chosen chapters and a shared one
        monkeypatch.undo()
        torch.testing.assert_close(y, read(x, bank, {})[0].detach(), rtol=1e-12, atol=1e-12)


def test_codes_errors_and_footprint():
    rows = torch.randn(50, 7) * torch.logspace(-3, 3, 50)[:, None]
    for name, largest in (("int8", 127), ("int4", 7)):
        codes, scale = quantize(rows, name)
        seen = dequantize(codes, scale, name, 7)
        assert (seen - rows).abs().div(scale).max() <= 0.5 + 1e-4  # half a step of the row
        torch.testing.assert_close(seen.abs().amax(1), rows.abs().amax(1))
        assert codes.nbytes == 50 * (7 if name == "int8" else 4)
        assert quantization_error(rows, name) == pytest.approx(((seen - rows).norm() / rows.norm()).item())
        assert 0.1 / largest < quantization_error(rows, name) < 1 / largest
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 3), "int4"), "int4", 3), torch.zeros(2, 3))
    bank = MemoryBank(1024, 256)
    assert bank.footprint() == {"bytes": 1024 * 256 * 4, "float32_bytes": 1024 * 256 * 4}
    assert bank.quantize("int8").footprint()["bytes"] == 1024 * (256 + 4)
    assert bank.quantize("int4").footprint()["bytes"] == 1024 * (128 + 4)
    factorized = MemoryBank(1024, 256, "factorized", 16).quantize("int4")
    assert factorized.footprint()["bytes"] == 1024 * (8 + 4) + 256 * 16 * 4
    assert factorized.quantize("int4").footprint() == factorized.footprint()


def test_quantization_aware_training_passes_the_gradient_straight_through():
    bank, read = build(quantization="int4", aware=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    frozen = bank.quantize("int4").double()
    torch.testing.assert_close(read(x, bank, {})[0], read(x, frozen, {})[0], rtol=1e-6, atol=1e-6)
    seen = bank.rows().detach().requires_grad_()
    assert torch.equal(seen, fake_quantize(bank.weight, "int4")) and not torch.equal(seen, bank.weight)
    weight = torch.randn(24, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad((bank.rows() * weight).sum(), bank.weight)
    assert torch.equal(grad, weight)


def test_keys_and_values_are_projected_once_and_again_when_a_weight_changes(monkeypatch):
    bank, read = build(num_chapters=8, **CHAPTERS)
    x, calls, project = torch.randn(3, 5, 12, dtype=torch.float64), [], read._project
    monkeypatch.setattr(read, "_project", lambda *a: calls.append(len(a[1])) or project(*a))

    def count(change=None):
        before = len(calls)
        with torch.no_grad():
            if change:
                change()
            torch.testing.assert_close(
                read(x, bank, {})[0], copy.deepcopy(read)(x, bank, {})[0]
            )  # a copy keeps nothing
        return len(calls) - before - 1

    assert count() == 1 and count() == 0
    assert count(lambda: bank.weight.add_(0.1)) == 1
    assert count(lambda: read.k_proj.weight.mul_(1.1)) == 1
    assert count(lambda: setattr(read.v_proj, "weight", torch.nn.Parameter(read.v_proj.weight + 1))) == 1
    assert count(lambda: bank.load_state_dict({"weight": torch.randn(24, 8)})) == 1
    assert count(lambda: (bank.weight.data.add_(1), read.eval())) == 1
    assert count() == 0
    other = copy.deepcopy(bank)
    with torch.no_grad():
        other.weight += 1
        swapped = read(x, other, {})[0]
    assert not torch.allclose(swapped, read(x, bank, {})[0])
    assert pickle.loads(pickle.dumps(copy.deepcopy(read).__getstate__()["_cached"])) is None
    with torch.inference_mode():
        torch.testing.assert_close(read(x, other, {})[0], swapped)
    read.train()
    assert read._cached is None


def test_a_fused_step_in_evaluation_mode_is_seen():
    """A fused optimizer changes weights without raising their version."""
    bank, read = build()
    optimizer = torch.optim.AdamW([*bank.parameters(), *read.parameters()], lr=0.1, fused=True)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        before = read(x, bank, {})[0]
    read(x, bank, {})[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = read(x, bank, {})[0]
        torch.testing.assert_close(after, by_hand(bank, read, x))
    assert not torch.equal(before, after)


def test_training_projects_the_chosen_chapters_only(monkeypatch):
    bank, read = build(num_chapters=8, routing="prompt", block_size=2, **CHAPTERS)
    read.train()
    x, rows, project = torch.randn(1, 5, 12, dtype=torch.float64), [], read._project
    monkeypatch.setattr(read, "_project", lambda *a: rows.append(len(a[1])) or project(*a))
    y, _, _ = read(x, bank, {})
    assert rows == [3 * 3]  # one shared chapter and two chosen ones of eight
    torch.testing.assert_close(y, read.eval()(x, bank, {})[0])
    gradient = torch.autograd.grad(y.sum(), bank.weight)[0].abs().sum(1) > 0
    assert gradient.sum() == 9 and gradient[:3].all()


def test_a_new_memory_changes_nothing():
    bank = MemoryBank(24, 8)
    read = MemoryRead(12, 8, 4)
    read.init_weights(0.1)
    assert not read(torch.randn(2, 5, 12), bank, {})[0].any()
    low = MemoryRead(12, 8, 4, projection_rank=2)
    low.init_weights(0.1)
    assert not low(torch.randn(2, 5, 12), bank, {})[0].any() and low.o_proj.down.weight.any()


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: MemoryBank(10, 8, num_chapters=4), "num_chapters 4 does not divide the 10 memory tokens"),
        (lambda: MemoryBank(10, 8, "low"), "standard, factorized or reduced, not 'low'"),
        (lambda: MemoryBank(10, 8, "reduced", 9), "a rank between 1 and its width 8, not 9"),
        (lambda: MemoryBank(10, 8, "factorized"), "not None"),
        (lambda: MemoryBank(10, 8, quantization="nf4"), "unknown quantization format 'nf4'"),
        (lambda: MemoryBank(10, 8, quantization_aware=True), "needs a quantization format"),
        (lambda: quantize(torch.randn(2, 2), "int2"), "unknown quantization format 'int2'"),
        (lambda: MemoryRead(12, 8, 3), "width 8 cannot have 3 heads"),
        (lambda: MemoryRead(12, 8, 4, mixing="both"), "not 'both'"),
        (lambda: MemoryRead(12, 8, 4, num_chapters=4, top_k_chapters=5), "top_k_chapters 5 .* the 4 routed chapters"),
        (lambda: MemoryRead(12, 8, 4, num_chapters=4, num_shared_chapters=4), "4 shared chapters leave none of 4"),
        (lambda: MemoryRead(12, 8, 4, routed_scaling_factor=0.0), "must be positive, not 0"),
        (lambda: MemoryRead(12, 8, 4)(torch.randn(1, 1, 12), MemoryBank(4, 16), {}), "16 wide .* tokens of 8"),
        (
            lambda: MemoryRead(12, 8, 4, num_chapters=4)(torch.randn(1, 1, 12), MemoryBank(4, 8, num_chapters=2), {}),
            "has 2 chapters and this layer routes to 4",
        ),
    ],
)
def test_refusals(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()
