"""An installed memzoo, in a virtual environment that sees this one's dependencies but not this one's memzoo."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", ".venv", "build", "dist", "demo", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


@pytest.fixture(scope="session")
def run():
    """`run(command, ..., cwd=folder)` -> what it printed, with no trace of the caller's Python paths."""

    def run(*command: object, cwd: Path, **environment: str) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the working tree, so that building leaves nothing behind in it."""
    folder = tmp_path_factory.mktemp("checkout") / "memzoo-checkout"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.fixture(scope="session")
def wheel(run, checkout) -> Path:
    """The wheel, built from the source distribution."""
    run(sys.executable, "-m", "build", "-q", "--no-isolation", ".", cwd=checkout)
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory) -> Path:
    """Links to everything in this environment's site-packages but memzoo and Hugging Face's kernels."""
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("memzoo", "__editable__", "kernels", "__pycache__")) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def make_environment(run, tmp_path_factory, dependencies):
    """`make_environment("wheel.whl")` -> the Python of a new environment with this installed in it."""

    def make(*what: object) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        python = folder / "bin/python"
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
        Path(site, "dependencies.pth").write_text(str(dependencies))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
        run(*pip, "--no-deps", "--no-index", "--no-build-isolation", *what, cwd=folder)
        return python

    return make


@pytest.fixture(scope="session")
def installed(make_environment, wheel) -> Path:
    return make_environment(wheel)
