"""JSON arrays, CSV, Arrow and zstd: the same rows whatever they came in; and column maps and groups over them."""

import csv
import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from components.ingest_rankings.exports.columns import column_map
from components.ingest_rankings.groups import Grouping
from components.ingest_rankings.rows import Rejected, read_rows
from components.ingest_rankings.stage import Config
from components.services.exits import DoNotRetry
from tests.unit.components.ingest_rankings.exports.samples import LABEL_STUDIO, SUMMEVAL

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROWS = [{"prompt": f"Wie {n} \u00fc?", "chosen": 'ja, "so"\nund so', "rejected": "nein"} for n in range(600)]


def table_of_text(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, rows[0].keys(), **options)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


def arrow(is_file: bool) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd.compress(LINES),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": b"\xef\xbb\xbf  " + json.dumps(ROWS).encode(),
    "a.json.zst": zstd.compress(json.dumps(ROWS).encode()),
    "a.csv": table_of_text(ROWS),
    "b.csv": b"\xef\xbb\xbf" + table_of_text(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "a.tsv.gz": gzip.compress(table_of_text(ROWS, delimiter="\t")),
    "a.arrow": arrow(True),
    "stream.arrow": arrow(False),
    "a.feather": zstd.compress(arrow(True)),
}


def read(name: str, data: bytes, scratch: Path, max_row_bytes: int = 1000) -> list[Any]:
    return list(read_rows(io.BytesIO(data), name, scratch, max_row_bytes))


@pytest.mark.parametrize("name", list(FILES))
def test_the_same_rows_whatever_they_came_in(name: str, tmp_path: Path) -> None:
    rows = read(name, FILES[name], tmp_path)
    assert [row.value for row in rows] == ROWS
    assert not any(row.problem for row in rows)
    assert list(tmp_path.iterdir()) == [], "no copy is left"


@pytest.mark.parametrize("name", list(FILES))
def test_every_kind_of_file_gives_the_same_snapshot(name: str, ingest: Callable[..., Any]) -> None:
    assert ingest({name: FILES[name]}).snapshot == ingest({"all.jsonl": LINES}).snapshot


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json", "a.json.zst", "a.arrow", "stream.arrow", "a.feather"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_file_that_is_cut_off_ends_the_ingestion(name: str, share: float, tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"breaks after|not a readable"):
        read(name, FILES[name][: int(len(FILES[name]) * share)], tmp_path)


def test_a_quote_that_does_not_end_ends_the_ingestion(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match="line 3: a quoted cell does not end"):
        read("a.csv", b'prompt,chosen\nHi,a\nHo,"b\nHa,c\n', tmp_path)


def test_records_of_csv_have_the_number_of_their_first_line_and_their_reasons(tmp_path: Path) -> None:
    data = b'prompt,chosen,rejected\nHi,"a\nb",c\n\nHo,a\nHe,a,\nHa,\xff,c\n'
    rows = read("a.csv", data, tmp_path)
    assert [(row.number, row.problem.reason if row.problem else "") for row in rows] == [
        (2, ""),
        (5, "not one cell per column"),
        (6, ""),
        (7, ""),
    ]
    assert rows[2].value == {"prompt": "He", "chosen": "a", "rejected": None}


def test_csv_text_that_is_not_utf8_is_rejected_and_kept(ingest: Callable[..., Any]) -> None:
    found = ingest({"a.csv": b"prompt,chosen,rejected\nHa,\xff,c\nHi,a,b\n"})
    assert (found.snapshot.rankings, found.reasons) == (1, {"a text is not valid Unicode": 1})


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match="columns of the same name: 'a'"):
        read("a.csv", b"a,b,a\n1,2,3\n", tmp_path)


def test_elements_of_an_array_that_are_no_objects_are_rejected_alone(ingest: Callable[..., Any]) -> None:
    found = ingest({"a.json": json.dumps([ROWS[0], 7, None, ROWS[1]]).encode()})
    assert (found.read, found.snapshot.rankings, found.reasons) == (4, 2, {"not a JSON object": 2})


@pytest.mark.parametrize("name", list(FILES))
def test_mutated_files_are_rows_or_refused(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    for _ in range(60):
        data = bytearray(FILES[name])
        for _ in range(chance.choice((1, 3))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            rows = read(name, bytes(data), tmp_path)
        except DoNotRetry:
            continue
        assert all(isinstance(row.value, dict) != (row.problem is not None) for row in rows)


# -- column maps and groups ------------------------------------------------------------------------------------------------


def test_a_table_of_scores_is_read_by_a_column_map(ingest: Callable[..., Any]) -> None:
    rows = [
        {"question": "Late.", "a": "Sorry.", "b": "Wait.", "score_a": "4", "score_b": "2.5", "worker": "w1"},
        {"question": "Late.", "a": "Sorry.", "b": "Wait.", "score_a": "x", "score_b": "2", "worker": "w2"},
    ]
    columns = {
        "prompt": "question",
        "completions": "[a, b]",
        "scores": "[to_number(score_a), to_number(score_b)]",
        "rater_id": "worker",
    }
    found = ingest({"a.csv": table_of_text(rows)}, columns=columns)
    assert [(each.ranks, each.rater_id) for each in found.rankings] == [([1, 2], "w1")]
    assert found.reasons == {"a score is not a finite number": 1}
    assert found.files[0].formats == {"columns": 1}


def test_a_row_per_score_becomes_a_ranking_per_rater_and_prompt(ingest: Callable[..., Any]) -> None:
    rows = [
        {"prompt": prompt, "system": system, "answer": f"{system} says", "worker": worker, "score": score}
        for prompt in ("Hi", "Ho")
        for worker, scores in (("w1", "312"), ("w2", "221"))
        for system, score in zip("ABC", scores, strict=True)
    ]
    random.Random(0).shuffle(rows)
    half = len(rows) // 2
    columns = {
        "prompt": "rows[0].prompt",
        "completions": "rows[].answer",
        "scores": "rows[].to_number(score)",
        "policies": "rows[].system",
        "rater_id": "rows[0].worker",
    }
    found = ingest(
        {"a.csv": table_of_text(rows[:half]), "b.csv": table_of_text(rows[half:])}, group="[prompt, worker]", columns=columns
    )
    assert found.read == found.snapshot.rankings == 4
    expected = {"w1": {"A": 1, "B": 3, "C": 2}, "w2": {"A": 1, "B": 1, "C": 3}}
    for each in found.rankings:
        assert dict(zip(each.policies, each.ranks, strict=True)) == expected[each.rater_id]


def test_summeval_rows_are_brought_together_by_their_article(ingest: Callable[..., Any]) -> None:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in SUMMEVAL["rows"])
    assert ingest({"a.jsonl": lines}, group="id").snapshot.rankings == 6
    with_none = ingest({"a.jsonl": lines + b'{"decoded": "x"}\n{"id": null}\n'}, group="id")
    assert with_none.reasons == {"the row's group cannot be told": 2}
    assert ingest({"a.jsonl": lines}).reasons == {"one summary of an article alone": 2}


def test_each_annotation_of_an_export_is_counted(ingest: Callable[..., Any]) -> None:
    found = ingest({"export.json": json.dumps([LABEL_STUDIO, {**LABEL_STUDIO, "id": 8, "annotations": []}]).encode()})
    assert (found.read, found.snapshot.rankings, found.reasons) == (3, 2, {"task without annotations": 1})
    assert found.files[0].formats == {"label_studio": 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "a[", "ranks": "b"}, "not a JMESPath expression"),
        ({"prompt": "a", "rank": "b"}, "no field 'rank' in a ranking"),
    ],
)
def test_a_wrong_column_map_is_refused_before_anything_is_read(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(columns=columns)
    with pytest.raises(ValueError, match="not a JMESPath expression"):
        Config(group="a[")


def test_a_column_map_that_does_not_fit_names_the_field() -> None:
    export = column_map({"prompt": "q", "completions": "join(',', q)"})
    with pytest.raises(Rejected, match="the column map does not fit: completions"):
        list(export.rankings({"q": 7}))


def test_rows_wait_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    with Grouping("k", tmp_path / "groups") as grouping:
        for number in range(3000):
            grouping.add("f", number, {"k": number % 1000, "n": number})
        groups = list(grouping.groups())
    assert sorted(group.row.value["rows"][0]["n"] for group in groups) == list(range(1000))
    assert all([row["n"] // 1000 for row in group.row.value["rows"]] == [0, 1, 2] for group in groups)
