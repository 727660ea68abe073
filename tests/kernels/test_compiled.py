"""Compiled code gives the same bits compiled just now or loaded from the cache, and follows all its sources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from memzoo.kernels import compiled

# `exponentials` is too long to be inlined twice; its sum may be taken in another order in each of its copies
PROGRAM = """
import numpy as np
from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.window_attention.loops import exponentials
from numba import njit

@njit(fastmath=FAST, **OPTIONS)
def sums(x, out):
    for i in range(len(x)):
        out[i, 0] = exponentials(x[i], x[i, 0])
        out[i, 1] = exponentials(x[i], x[i, 1])

out = np.zeros((64, 2), np.float32)
sums(np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32), out)
print(out.tobytes().hex())
"""


def test_compiled_and_cached_code_agree(tmp_path):
    program, cache = tmp_path / "program.py", tmp_path / "numba"
    program.write_text(PROGRAM)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run([sys.executable, "-P", program], env=env, check=True, capture_output=True).stdout

    compiled = run()
    assert list(cache.rglob("*.sums-*.nbc")) and list(cache.rglob("*.exponentials-*.nbc"))
    assert run() == compiled  # all of it loaded
    for file in cache.rglob("*.sums-*.nbc"):
        file.unlink()
    assert run() == compiled  # what is called loaded, the caller compiled


PACKAGE = {
    "root/memzoo/__init__.py": "",
    "root/memzoo/kernels/compiled.py": Path(compiled.__file__).read_text(),
    "root/memzoo/kernels/inner.py": "from numba import njit\n\n@njit\ndef inner(x):\n    return x + 1\n",
    "root/memzoo/kernels/between.py": "from memzoo.kernels.inner import inner\n",
    "root/memzoo/kernels/outer.py": """
from numba import njit
from memzoo.kernels.between import inner
from memzoo.kernels.compiled import OPTIONS

@njit(**OPTIONS)
def outer(x):
    return inner(x)
""",
}


def test_a_change_of_a_function_reaches_its_callers(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run():
        code = "from memzoo.kernels.outer import outer; print(outer(1), *outer.stats.cache_hits.values())"
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "root"), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
        done = subprocess.run([sys.executable, "-P", "-c", code], env=env, check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert run() == ["2"]
    assert run() == ["2", "1"]  # from the cache
    inner = tmp_path / "root/memzoo/kernels/inner.py"
    inner.write_text(inner.read_text().replace("x + 1", "x + 2"))
    assert run() == ["3"]
