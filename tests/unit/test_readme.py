"""The README's examples are read as what they are said to be, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from components.ingest_rankings.formats import Parsed, parse

ROOT = Path(__file__).parents[2]
READMES = sorted(
    path for folder in ("", "components", "pipelines", "images", "infra") for path in (ROOT / folder).glob("**/README.md")
)
READMES = [path for path in dict.fromkeys(READMES) if ".venv" not in path.parts]


def blocks(text: str) -> list[str]:
    return re.findall(r"```json\n(.*?)```", text, re.S)


def test_every_ranking_of_the_readmes_is_one() -> None:
    forms = []
    for path in (ROOT / "README.md", ROOT / "components/ingest_rankings/README.md"):
        for block in blocks(path.read_text(encoding="utf-8")):
            lines = [block] if block.startswith('{"prompt": [') and "\n " in block else block.splitlines()
            for line in lines:
                forms += [each.form for each in parse(json.loads(line), "auto", "unspecified", 0.1) if isinstance(each, Parsed)]
    assert forms[:3] == ["rankloop", "kway", "hh"]
    assert set(forms) == {"rankloop", "kway", "hh", "pairs"}


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
