"""The Python blocks of README and docs run, in order, page by page; YAML and JSON are valid; links lead somewhere.

Command lines: `tests/docs/`.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from memzoo.training.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, f"{page.name}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_and_json_blocks_are_what_memzoo_reads(page):
    """JSON: a line each of a file of conversations. YAML: sections of a run's file, or an evaluation task."""
    blocks = re.findall(r"```(yaml|json)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for language, block in blocks:
        if language == "json":
            turns = [turn for line in block.splitlines() for turn in json.loads(line)["messages"]]
            assert turns and all({"role", "content"} <= turn.keys() for turn in turns)
        elif "task" not in (settings := yaml.safe_load(block)):
            rest = {"model": {"model_type": "maru"}, "data": {"corpus": "sotu"}, "training": {"output_dir": "runs/a"}}
            parse_config({**rest, **settings})
        else:
            assert {"dataset_path", "output_type", "doc_to_text", "doc_to_target"} <= settings.keys()


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
