"""The registry's page and the lines of its tables."""

from __future__ import annotations

from typing import Any

from components.register_model.audit import Record
from components.register_model.lineage import Artifact, Version, facts
from components.register_model.page import audit_rows, registry_page
from components.rlhf.gate import decide


def record(number: int, event: str, session: str = "a", **content: Any) -> Record:
    by = {"user": "ada", "host": "pod-1", "command": "register_model"}
    whole = {"event": event, "action": "promote", "session": session, "by": by, "at": "2026-01-02T03:04:05.678901Z", "moves": []}
    return Record(number, "", whole | content)


def test_a_change_and_its_end_are_one_line() -> None:
    moves = [{"model": "policy", "alias": "champion", "from": "", "to": "1"}]
    evidence = {"gate": "fail", "evaluation": "s3://e", "objections": ["too long"]}
    rows = audit_rows([record(1, "begun", moves=moves, evidence=evidence, reason="why"), record(2, "done", of=1)])
    told = "gate fail\nevaluation s3://e\noverruled: too long"
    assert rows == [["1", "2026-01-02 03:04:05", "promote", "policy champion: none → 1", "ada@pod-1, register_model", told, "why"]]


def test_how_a_change_ended_is_told_where_it_is_not_the_usual_way() -> None:
    assert audit_rows([record(1, "begun")])[0][2] == "promote, not ended"
    assert audit_rows([record(1, "begun"), record(2, "done", "b", of=1)])[0][2] == "promote, ended by ada@pod-1, register_model"
    assert audit_rows([record(1, "begun"), record(2, "abandoned", of=1)])[0][2] == "promote, abandoned"
    assert audit_rows([record(1, "observed", action="observe")])[0][2] == "observe"


def test_facts_of_an_artifact_that_is_gone_are_none() -> None:
    assert facts(Artifact("policy", "s3://p", "", {})) == ""


def test_what_a_person_wrote_is_shown_and_never_run() -> None:
    rows, _ = decide({}, {})
    version = Version("1", ["champion"], {"gate": "pass", "policy_uri": "s3://p"}, "")
    page = registry_page("policy", [version], version, {}, rows, [record(1, "observed", reason="<script>alert(1)</script>")])
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Version 1 is champion." in page
