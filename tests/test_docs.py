"""The Python blocks of README and docs run, in order, page by page; links to files lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, f"{page.name}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_configs_and_folders_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"training/configs/\w+\.yaml", text):
        assert (ROOT / path).is_file(), path
    for folder in re.findall(r"^(\w+)/ ", text, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
