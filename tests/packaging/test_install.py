"""memzoo as a user gets it: a wheel, a regular and an editable install, from any folder."""

import shutil
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).parents[2]
FOLDERS = ["modeling", "adapters", "kernels", "training", "hub_cards"]

USE_EVERYTHING = """
import importlib, multiprocessing, pickle, sys

def in_another_process(config):
    import memzoo
    return config.model_type, memzoo.__file__

if __name__ == "__main__":
    import memzoo
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in memzoo.__all__:
        getattr(memzoo, name)
    for module in sys.argv[1].split():
        importlib.import_module(module)
    config = AutoConfig.for_model("maru", hidden_size=16, num_hidden_layers=1)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert type(AutoModelForCausalLM.from_config(config)) is memzoo.MaruForCausalLM
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(in_another_process, (config,)) == ("maru", memzoo.__file__)
    print(memzoo.__file__)
"""


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def modules(wheel):
    files = [name.removesuffix(".py") for name in contents(wheel) if name.endswith(".py")]
    return [name.replace("/", ".").removesuffix(".__init__") for name in files if not name.endswith("__main__")]


def test_wheel_contents(wheel):
    expected = {f"memzoo/{path.name}" for path in (ROOT / "src/memzoo").glob("*.py")} | {"memzoo/py.typed"}
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".yaml", ".md"}]
        expected |= {f"memzoo/{path.relative_to(ROOT)}" for path in files}
    assert contents(wheel) == expected
    assert "memzoo/kernels/__init__.py" not in expected, (
        "it would shadow Hugging Face's kernels in the repository root"
    )


@pytest.mark.parametrize("root_on_path", [False, True])
def test_wheel_works(run, installed, wheel, tmp_path, root_on_path):
    script = tmp_path / "use.py"
    script.write_text(USE_EVERYTHING)
    where = {"cwd": ROOT, "PYTHONPATH": str(ROOT)} if root_on_path else {"cwd": tmp_path}
    memzoo_file = run(installed, script, " ".join(modules(wheel)), **where).splitlines()[-1]
    assert memzoo_file.startswith(str(installed.parents[1]))


def test_command_line(run, installed, tmp_path):
    for command in ([installed.parent / "memzoo"], [installed, "-m", "memzoo"]):
        assert run(*command, "--version", cwd=tmp_path) == "memzoo 0.1.0"


def test_links_checked_out_as_text(run, checkout, wheel, make_environment, tmp_path):
    """git writes links as text files where core.symlinks is off (Windows, some archives)."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, symlinks=True, ignore=shutil.ignore_patterns("dist", "build", "*.egg-info"))
    for folder in FOLDERS:
        link = copy / "src/memzoo" / folder
        target = link.readlink()
        link.unlink()
        link.write_text(str(target))
    python = make_environment("-e", copy)
    found = run(python, "-c", "import memzoo.modeling.maru as m; print(m.__file__)", cwd=tmp_path)
    assert Path(found).samefile(copy / "modeling/maru/__init__.py")
    regular = make_environment(copy)
    site = Path(run(regular, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    files = {str(path.relative_to(site)) for path in (site / "memzoo").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == contents(wheel)
