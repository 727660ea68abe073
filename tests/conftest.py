"""Common to all tests: one thread, no network, and NaN in memory that nobody wrote."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

torch.set_num_threads(1)
# fills torch.empty with NaN, so that an output that nothing wrote cannot hide
torch.use_deterministic_algorithms(True, warn_only=True)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
