"""Overlapping windows: every token once, each with the context that the stride leaves it."""

import pytest
import torch
from torch.nn import functional as F

from memzoo.cli import main
from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.evaluate import document_nats, evaluate_documents, overlapping_nats
from memzoo.training.trainer import build_model


@pytest.fixture(params=["maru", "llama"])
def model(request, run_config):
    return build_model(run_config(request.param), MaruTokenizer(), seed=0).double().eval()


@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 8), (5, 2), (50, 7)])
def test_each_token_is_scored_once_with_the_context_before_it(model, window, stride):
    tokens = torch.randint(3, 264, (24,), generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for target in range(1, 24):
        first = (target - 1) // stride * stride  # of the tokens that its window scores
        context = tokens[max(0, first + stride - window) : target]
        expected -= F.log_softmax(model(context[None]).logits[0, -1].float(), -1)[tokens[target]].item()
    assert overlapping_nats(model, tokens, window, stride) == pytest.approx(expected, rel=1e-6)


def test_a_stride_as_long_as_the_window_is_the_plain_window(model):
    tokens = torch.randint(3, 264, (30,), generator=torch.Generator().manual_seed(1))
    assert overlapping_nats(model, tokens, 8, 8) == pytest.approx(document_nats(model, tokens, 8, False), rel=1e-9)


def test_a_stride_that_cannot_be_is_refused(model, capsys):
    with pytest.raises(ValueError, match=r"stride 9 goes with windows .* and is at most their 8 tokens"):
        evaluate_documents(model, MaruTokenizer(), [b"text"], 8, False, stride=9)
    assert main(["eval", "nothing", "--mode", "carry", "--stride", "4"]) == 2
    assert "--stride 4: goes with --mode window" in capsys.readouterr().err
