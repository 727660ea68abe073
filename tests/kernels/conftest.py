"""Running a program in a process of its own: Triton's interpreter is chosen before it is imported."""

import os
import subprocess
import sys
import textwrap

import pytest


@pytest.fixture
def run():
    def run(program: str, **environment: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout.strip()

    return run
