"""Nothing is lost, and the digest depends on nothing but the rankings: properties over generated sources."""

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest_rankings.stage import Config, check_counts
from components.services.launch import parse_settings

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@st.composite
def good_lines(draw: st.DrawFn) -> bytes:
    prompt = draw(st.sampled_from(["Hi", "Help me", "Why?", "\u00fc"]))
    first, second = draw(st.sampled_from([("a", "b"), ("b", "a"), ("Sorry.", "\u2603")]))
    kind = draw(st.integers(0, 3))
    row: dict[str, Any] = {"prompt": prompt, "completions": [first, second], "ranks": [1, 2]}
    if kind == 1:
        row = {"prompt": prompt, "completions": [first, second], "scores": draw(st.sampled_from([[1, 2], [2.5, 2.5]]))}
    elif kind == 2:
        row = {"prompt": prompt, "chosen": first, "rejected": second}
    elif kind == 3:
        row = {key: f"\n\nHuman: {prompt}\n\nAssistant: {text}" for key, text in (("chosen", first), ("rejected", second))}
    if draw(st.booleans()):
        row["rater_id"] = draw(st.sampled_from(["r1", "r2"]))
    return json.dumps(row, ensure_ascii=draw(st.booleans())).encode()


BAD_LINES = st.sampled_from(
    [
        b"{}",
        b"[]",
        b"null",
        b'{"prompt": "Hi", "completions": ["a"], "ranks": [1]}',
        b'{"prompt": "Hi", "comple',
        b"\xff\xfe",
        b"\x00",
    ]
) | st.dictionaries(TEXT, TEXT, max_size=2).map(lambda value: json.dumps(value).encode())
LINE = good_lines() | good_lines() | BAD_LINES


def as_files(lines: list[bytes], cuts: list[int], packed: list[bool]) -> dict[str, bytes]:
    edges = [0, *sorted(cut % (len(lines) + 1) for cut in cuts), len(lines)]
    files = {}
    for number, (start, end) in enumerate(pairwise(edges)):
        data = b"\n".join(lines[start:end]) + b"\n"
        files[f"{number}.jsonl"] = gzip.compress(data) if packed[number % len(packed)] else data
    return files


@settings(max_examples=20, deadline=None)
@given(
    lines=st.lists(LINE, max_size=12),
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(0, 100), max_size=3),
    packed=st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_counts_add_up_and_digest_is_invariant(
    ingest: Callable[..., Any], lines: list[bytes], order: Any, cuts: list[int], packed: list[bool]
) -> None:
    first = ingest({"all.jsonl": b"\n".join(lines)})
    shuffled = list(lines)
    order.shuffle(shuffled)
    second = ingest(as_files(shuffled, cuts, packed))
    for found in (first, second):
        assert found.read == len(lines)
        assert found.snapshot.rankings + found.duplicates + sum(found.reasons.values()) == found.read
        assert len(found.quarantined) == sum(found.reasons.values())
        assert len(found.rankings) == found.snapshot.rankings
    assert second.snapshot == first.snapshot
    assert second.rankings == first.rankings
    assert second.reasons == first.reasons


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b" ").replace(b"\x1f\x8b", b"  ")), max_size=6))
def test_random_bytes_are_all_counted(ingest: Callable[..., Any], lines: list[bytes]) -> None:
    data = b'{"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 2]}\n' + b"\n".join(lines)
    found = ingest({"a.jsonl": data})
    assert found.read == 1 + sum(bool(line.strip()) for line in lines)
    assert found.read == found.snapshot.rankings + found.duplicates + len(found.quarantined)
    assert found.snapshot.rankings == 1


def test_quarantine_names_file_row_reason_value_and_keeps_the_row(ingest: Callable[..., Any]) -> None:
    good = b'{"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 2]}'
    cut = good[:30]
    wrong = good.replace(b"[1, 2]", b"[1, 3]")
    found = ingest({"x/a.jsonl": b"\n".join([good, b"", wrong, b"\xff" + good, cut])})
    assert [(Path(each["file"]).name, each["row"], each["reason"]) for each in found.quarantined] == [
        ("a.jsonl", 3, "ranks are not a ranking"),
        ("a.jsonl", 4, "not UTF-8"),
        ("a.jsonl", 5, "not JSON"),
    ]
    assert [each["raw"] for each in found.quarantined] == [wrong.decode(), "\\xff" + good.decode(), cut.decode()]
    assert "[1, 3]" in found.quarantined[0]["detail"]


def test_mistake_parsing_held_out_rows_that_cannot_be_read_are_counted_by_their_reason(ingest: Callable[..., Any]) -> None:
    good = {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 2], "split": "test"}
    rows = [good, {**good, "ranks": [1, 3]}, {**good, "completions": ["a"]}, {**good, "prompt": ""}]
    result = ingest({"held_out.jsonl": "\n".join(map(json.dumps, rows)).encode() + b'\n{"split": "test", "prom'})
    assert (result.read, result.snapshot.rankings) == (5, 1)
    assert sum(result.reasons.values()) == len(result.quarantined) == 4
    assert {each["row"] for each in result.quarantined} == {2, 3, 4, 5}


def test_quarantine_is_bounded_but_counted(ingest: Callable[..., Any]) -> None:
    found = ingest({"a.jsonl": b"{}\n" * 50 + b"[]\n" * 25}, max_quarantined=10)
    assert len(found.quarantined) == 10
    assert found.reasons == {"unknown form": 50, "not a JSON object": 25}


def test_fields_that_are_left_out_are_counted(ingest: Callable[..., Any]) -> None:
    row = b'{"prompt": "Hi", "chosen": "a", "rejected": "%d", "margin": 1}\n'
    assert ingest({"a.jsonl": b"".join(row % n for n in range(7))}).ignored == {"margin": 7}


@pytest.mark.parametrize("counts", [(3, 1, 1, 0), (3, 2, 1, 1), (1, 2, -1, 0)])
def test_lost_rows_are_a_defect(counts: tuple[int, int, int, int]) -> None:
    check_counts(4, 2, 1, 1)
    with pytest.raises(RuntimeError, match="rows are lost"):
        check_counts(*counts)


def test_readme_lists_every_option() -> None:
    readme = Path(__file__).parents[4] / "components" / "ingest_rankings" / "README.md"
    table = [line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    defaults = parse_settings(Config, {}, "ingest_rankings")
    assert table == [
        f"| `{name}` | {json.dumps(getattr(defaults, name))} | {field.description} |" for name, field in Config.model_fields.items()
    ]
