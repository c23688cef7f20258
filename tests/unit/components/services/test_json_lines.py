"""A user's JSON lines: whatever is in the file, the outcome is its rows or a refusal that names the line."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from components.evaluate.refusals import read_probes
from components.rlhf.records import ROLES
from components.services.exits import DoNotRetry
from components.services.json_lines import read_json_lines
from components.train_sft.examples import read_demonstrations

NO_STORE: Any = None
TEXT = st.text(max_size=8) | st.just("\ud83d")  # half of a character, which JSON can write
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES) | SCALARS, "content": TEXT | SCALARS}), max_size=3)
ROWS = st.fixed_dictionaries(
    {"prompt": MESSAGES | TEXT | VALUES}, optional={"completion": TEXT | VALUES, "harmful": st.booleans() | SCALARS}
)
LINES = (ROWS | VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20)
FILES = st.lists(LINES, max_size=4).map(b"\n".join)


def check(read: Any, data: bytes) -> None:
    """Reads a file with this content: every prompt is a chat that can be written, or the file is refused and named."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(data)
        rows, message = [], ""
        try:
            rows = read(str(path), NO_STORE)
        except DoNotRetry as refused:
            message = refused.message
    assert rows or re.search(rf"{path}(, line \d+: not a| has no| is damaged)", message)
    for row in rows:
        assert row.prompt
        for message in row.prompt:
            assert message["role"] in ROLES
            assert message["content"].encode().strip()


@settings(max_examples=80, deadline=None)
@given(FILES | FILES.map(gzip.compress) | st.binary(max_size=40).map(b"\x1f\x8b".__add__))
@example(b"[" * 100_000)
@example(b'{"prompt": ' + b"1" * 5000 + b', "completion": "a"}')
@example(gzip.compress(b'{"prompt": "a", "completion": "b"}')[:12])
@example('{"prompt": "\u00fc", "completion": "b"}'.encode("utf-16"))
def test_any_demonstrations_are_examples_or_are_refused(data: bytes) -> None:
    check(read_demonstrations, data)


@settings(max_examples=60, deadline=None)
@given(FILES)
@example(b'{"prompt": "a", "harmful": 1}')
def test_any_probe_prompts_are_probes_or_are_refused(data: bytes) -> None:
    check(read_probes, data)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody/rows.jsonl", "", ".", "\ud800"])
def test_any_name_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(DoNotRetry, match="are not a file"):
        read_json_lines(name, NO_STORE, dict, what="row", form="anything")
