"""docs/configuration.md names keys that exist, and all sections."""

import re
from pathlib import Path

import pytest

from memzoo.training.config import SECTIONS
from memzoo.training.explain import SECTIONS_OF_ADAPT, explain

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
ALL = list(dict.fromkeys([*SECTIONS, *SECTIONS_OF_ADAPT]))
KEYS = sorted(set(re.findall(rf"(?:`|--explain )((?:{'|'.join(ALL)})\.\w+)", PAGE)))


def test_the_page_speaks_of_many_keys_and_every_section():
    assert len(KEYS) > 50
    assert [name for name in ALL if f"| `{name}` |" not in PAGE] == []


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("model.model_type", "model.pretrained")])
def test_a_key_of_the_page_exists(key):
    assert explain(key)
