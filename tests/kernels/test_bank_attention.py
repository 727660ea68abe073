"""Bank attention against the loop over tokens: ways to choose and to mix, gradients, precision, refusals."""

import pytest
import torch
from torch.autograd import gradcheck

from memzoo.kernels import threads as pool
from memzoo.kernels.bank_attention import bank_attention, bank_attention_loaded, fused, plan, products, reference

BEYOND = 0.9  # with keys and queries of 30 in one column, exp of a logit overflows in float64

# heads, key heads, shared chapters, mixing, choices (per token, by groups of tokens, per row), scale of the logits
CASES = {
    "token": (4, 4, 0, "joint", "token", None),
    "grouped heads": (4, 2, 0, "joint", "token", None),
    "one key head, shared": (4, 1, 2, "joint", "groups", 1.0),
    "separate": (2, 2, 0, "separate", "token", None),
    "separate, shared": (4, 2, 1, "separate", "row", None),
    "logits beyond exp": (2, 1, 1, "joint", "token", BEYOND),
    "separate beyond exp": (2, 2, 0, "separate", "groups", BEYOND),
}


@pytest.fixture(params=["fused", "torch", "torch, deterministic"])
def form(request, monkeypatch):
    """The compiled loops, and what does without Numba. In the loops nothing depends on deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms("deterministic" in request.param, warn_only=True)
    if request.param != "fused":
        monkeypatch.setattr(fused, "is_available", lambda: False)
    elif not fused.is_available():
        pytest.skip("numba is not installed")
    yield request.param
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


needs_numba = pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")


def make(case, B=2, T=13, dh=6, dv=5, chapters=7, size=5, slots=3, dtype=torch.float64):
    H, kv_heads, shared, mixing, choice, scale = CASES[case]
    q = torch.randn(B, T, H, dh, dtype=dtype)
    k, v = (torch.randn(kv_heads, chapters * size, d, dtype=dtype) for d in (dh, dv))
    if scale == BEYOND:
        q[..., 0], k[..., 0] = 30.0, 30.0
    G = {"token": T, "groups": 4, "row": 1}[choice]
    chosen = torch.rand(B, G, chapters - shared).topk(slots, -1).indices + shared
    chosen[0, 0, 1] = -1  # an unused slot, and a choice of nothing
    chosen[-1, -1] = -1
    log_weights = torch.randn(B, G, slots, dtype=dtype)
    groups = torch.randint(0, G, (B, T)) if choice == "groups" else None
    options = (chosen, chapters, shared, mixing, scale, groups)
    return [x.requires_grad_() for x in (q, k, v, log_weights)], options


def read(tensors, options, op=bank_attention, **more):
    q, k, v, log_weights = tensors
    chosen, *rest = options
    return op(q, k, v, chosen, log_weights, *rest, **more)


def assert_agrees(tensors, options, tolerance):
    results = []
    for op in (bank_attention, reference):
        out = read(tensors, options, op)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    for name, got, expected in zip(("out", "q", "k", "v", "log_weights"), *results):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name


def tolerance(case: str) -> float:
    return 1e-11 if "beyond" in case else 1e-12


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, form):
    assert_agrees(*make(case), tolerance(case))


@pytest.mark.parametrize("form", ["torch", "torch, deterministic"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_in_many_small_tiles(case, form, monkeypatch):
    """Stages that cut chapters, parts of a chapter's pairs, parts of its keys."""
    monkeypatch.setattr(plan, "STAGE", 200)
    for name, size in (("LOGITS", 8), ("ROWS", 3), ("KEYS", 2)):
        monkeypatch.setattr(products, name, size)
    assert_agrees(*make(case), tolerance(case))


@needs_numba
@pytest.mark.parametrize("case", CASES)
def test_compiled_loops_over_several_tiles_and_blocks(case):
    assert_agrees(*make(case, T=50, dh=20, dv=33, chapters=4, size=520, slots=2), tolerance(case))


@needs_numba
def test_compiled_loops_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(pool, "SERIAL_WORK", 0)
    for case in ("token", "one key head, shared", "separate, shared"):
        tensors, options = make(case, T=800, dh=16, dv=16, size=40, dtype=torch.float32)
        results = []
        for number in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
            out = read(tensors, options)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for one, two, three in zip(*results):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-5)
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][0], results[2][0])
        for i in (2, 3):  # of k and v
            assert torch.equal(results[0][i], results[1][i]) and torch.equal(results[0][i], results[2][i])


def test_a_chapter_that_a_token_chose_twice(form):
    for case in ("grouped heads", "separate"):
        tensors, (chosen, *rest) = make(case)
        chosen[:, ::2, 2] = chosen[:, ::2, 0]
        assert_agrees(tensors, (chosen, *rest), 1e-12)


@needs_numba
def test_a_chapter_that_does_not_exist():
    tensors, (chosen, *rest) = make("token")
    chosen[1, 2, 0] = 7
    with pytest.raises(ValueError, match="not below the number of chapters"):
        read(tensors, (chosen, *rest))


def test_gradcheck(form):
    tensors, options = make("separate, shared", B=2, T=3, dh=2, dv=2, chapters=4, size=2, slots=2)
    assert gradcheck(lambda *x: read(x, options), tensors)
    tensors, options = make("one key head, shared", B=2, T=3, dh=2, dv=2, chapters=5, size=2, slots=2)
    assert gradcheck(lambda *x: read(x, options), tensors)


@pytest.mark.parametrize("case", CASES)
def test_a_few_tokens_without_a_gradient(case):
    tensors, options = make(case, T=4)
    with torch.no_grad():
        out = read(tensors, options)
        assert not torch.equal(out, read(tensors, options, implementation="chunked")) or "beyond" in case
    torch.testing.assert_close(out, read(tensors, options, reference), rtol=1e-12, atol=1e-11)


def test_gradients_without_a_router(form):
    tensors, options = make("grouped heads")
    fixed = [*tensors[:3], tensors[3].detach()]
    loss, expected = read(fixed, options).square().sum(), read(tensors, options).square().sum()
    for got, want in zip(torch.autograd.grad(loss, tensors[:3]), torch.autograd.grad(expected, tensors[:3])):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_whole_bank(form):
    implementation = "fused" if form == "fused" else "auto"
    for H, kv_heads in ((4, 4), (4, 2)):
        q = torch.randn(3, 5, H, 8, dtype=torch.float64, requires_grad=True)
        k, v = (torch.randn(kv_heads, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        out = bank_attention(q, k, v, implementation=implementation)
        torch.testing.assert_close(out, reference(q, k, v), rtol=1e-12, atol=1e-12)
        every = torch.arange(11).expand(3, 1, -1)  # the same, as a choice of all one-token chapters
        chosen = bank_attention(q, k, v, every, torch.zeros(3, 1, 11, dtype=torch.float64), 11)
        torch.testing.assert_close(chosen, out, rtol=1e-12, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, chosen))):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@needs_numba
def test_a_large_whole_bank_is_read_by_compiled_loops_if_it_has_a_gradient():
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in ((1, 300, 2, 16), (1, 2048, 16), (1, 2048, 16)))
    compiled = bank_attention(q, k, v, implementation="fused")
    with torch.no_grad():
        assert not torch.equal(bank_attention(q, k, v), compiled)
    assert torch.equal(bank_attention(q, k, v), compiled)
    torch.testing.assert_close(bank_attention(q, k, v, implementation="chunked"), compiled)


@pytest.mark.parametrize("kv_heads, parts", [(1, 4), (2, 2)])
def test_the_whole_bank_on_four_threads(kv_heads, parts, monkeypatch):
    """Rows are split among the threads, since torch's backward has one a head."""
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q, *args, **options):
        seen.append(len(q))
        return attend(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    shapes = (2, 6, 4, 8), (kv_heads, 10, 8), (kv_heads, 10, 5)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = bank_attention(*inputs, implementation="chunked")
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert seen == [1, parts]
    for one, four in zip(*results):
        torch.testing.assert_close(four, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["fused", "torch, deterministic"], indirect=True)
def test_what_a_token_reads_does_not_depend_on_the_others_to_the_last_bit(form):
    for dtype in (torch.float32, torch.float64):
        (q, k, v, w), (chosen, *rest) = make("token", B=1, T=200, dh=16, dv=16, size=32, dtype=dtype)
        out = bank_attention(q, k, v, chosen, w, *rest)
        other = torch.rand(1, 200, 7).topk(3, -1).indices
        other[:, ::3] = chosen[:, ::3]
        for size in (1, 1e4):  # of other tokens' queries: their exponentials may overflow
            moved = torch.where(torch.arange(200)[:, None, None] % 3 == 0, q, size * torch.randn_like(q))
            again = bank_attention(moved, k, v, other, w, *rest)
            assert again.isfinite().all() and torch.equal(again[:, ::3], out[:, ::3])
            assert not torch.equal(again, out)


@pytest.mark.parametrize("case", ["grouped heads", "separate, shared"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_precision(case, dtype, tolerance, form):
    results = []
    for kind in (torch.float64, dtype):
        torch.manual_seed(2)
        tensors, options = make(case, T=150, dh=16, dv=16, size=40, dtype=torch.float32)
        # numbers that every type holds exactly
        tensors = [x.detach().bfloat16().to(torch.float32 if i == 3 else kind) for i, x in enumerate(tensors)]
        tensors = [x.requires_grad_() for x in tensors]
        out = read(tensors, options)
        assert out.dtype == kind
        loss = (out.double() * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()
        results.append([out, *torch.autograd.grad(loss, tensors)])
    for expected, got in zip(*results):
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_bank_that_is_loaded_in_parts(case):
    tensors, options = make(case, dv=6)
    asked = []

    def load(first, last):
        asked.append((first, last))
        return tensors[1][:, first:last], tensors[2][:, first:last]

    chosen, *rest = options
    q, k, _, log_weights = tensors
    out = bank_attention_loaded(q, load, (k.shape[0], k.shape[1]), chosen, log_weights, *rest)
    torch.testing.assert_close(out, read(tensors, options), rtol=1e-12, atol=1e-12)
    assert max(last - first for first, last in asked) <= 5 * max(rest[1], 1)  # a chapter, or the shared ones
    whole = bank_attention_loaded(q, load, (k.shape[0], k.shape[1]), num_chapters=7)
    torch.testing.assert_close(whole, bank_attention(q, k, tensors[2], scale=None), rtol=1e-12, atol=1e-12)


def test_compiles_as_one_node(form):
    tensors, options = make("one key head, shared")
    compiled = torch.compile(lambda *x: read(x, options), backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, lambda *x: read(x, options))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    (q, k, v, w), (chosen, *_) = make("grouped heads", dh=16)
    name = "fused" if form == "fused" else "chunked"
    arguments = (q.flatten(0, 1), k, padded(v, q), chosen.flatten(0, 1), w.flatten(0, 1), 5, 5, True, 1.0, name)
    torch.library.opcheck(torch.ops.memzoo.bank_attention.default, arguments)


def padded(v, q):
    return torch.nn.functional.pad(v.detach(), (0, q.shape[-1] - v.shape[-1])).requires_grad_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chapters": 6}, "6 chapters do not divide a bank of 35 tokens"),
        ({"num_shared": 8}, "num_shared 8 must be between 0 and the 7 chapters"),
        ({"mixing": "both"}, "mixing must be 'joint' or 'separate', not 'both'"),
        ({"k": torch.zeros(3, 35, 6)}, "k is .3, 35, 6. and v .4, 35, 5."),
        ({"k": torch.zeros(3, 35, 6), "v": torch.zeros(3, 35, 6)}, "4 query heads are not a multiple of the bank's 3"),
        ({"q": torch.zeros(2, 13, 24)}, r"q must be \[B, T, H, dh\]"),
        ({"log_weights": None}, "must both be"),
        ({"chapters": None}, "belong to chapters"),
        ({"groups": torch.zeros(2, 3, dtype=torch.long)}, r"groups is \[2, 3\], expected \[2, 13\]"),
        ({"implementation": "cuda"}, "auto, reference, chunked, fused or triton, not 'cuda'"),
        ({"implementation": "triton"}, "needs CUDA tensors"),
    ],
)
def test_refusals(change, message):
    (q, k, v, log_weights), (chosen, chapters, shared, mixing, *_) = make("token", dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "chapters": chosen, "log_weights": log_weights}
    arguments |= {"num_chapters": chapters, "num_shared": shared, "mixing": mixing, **change}
    with pytest.raises(ValueError, match=message):
        bank_attention(**arguments)
    with pytest.raises(ValueError, match="4 choices for 13 tokens need `groups`"):
        bank_attention(q, k, v, chosen[:, :4], log_weights[:, :4], 7)
