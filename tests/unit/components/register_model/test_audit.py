"""The chain of the audit: any change of any record is noticed."""

from __future__ import annotations

import hashlib
import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.register_model.audit import SERVICE_ACCOUNT_VARIABLE, Record, acting, anchor_of, faults


def chain(length: int, changed: int = 0) -> list[Record]:
    """A log of so many records; record `changed` was written again by somebody who did not mend those after it."""
    records: list[Record] = []
    previous = ""
    for number in range(1, length + 1):
        content = {"number": number, "previous": previous, "event": "done", "aliases": {}}
        previous = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        if number == changed:
            content["reason"] = "another"
        records.append(Record(number, hashlib.sha256(json.dumps(content).encode()).hexdigest(), content))
    return records


def test_a_whole_log_has_no_faults_and_an_empty_one_neither() -> None:
    records = chain(5)
    assert faults(records, anchor_of(records[-1])) == []
    assert faults(records, anchor_of(records[2])) == [], "the anchor may be behind: it is written last"
    assert faults([], "") == []


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_a_changed_record_is_noticed_by_the_next_one_and_the_last_by_the_anchor(case: tuple[int, int]) -> None:
    length, changed = case
    anchor = anchor_of(chain(length)[-1])
    assert faults(chain(length, changed), anchor)


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_a_missing_record_is_noticed(case: tuple[int, int]) -> None:
    length, missing = case
    records = chain(length)
    assert faults(records[:missing] + records[missing + 1 :], anchor_of(records[-1]))


def test_a_log_that_was_written_anew_is_not_the_one_that_the_registry_remembers() -> None:
    anew = [*chain(2), Record(3, "0" * 64, {"number": 3, "previous": chain(2)[-1].digest})]
    assert faults(anew, anchor_of(chain(3)[-1])) == ["record 3 is not the one that the registry remembers"]
    assert faults([], anchor_of(chain(1)[-1])) == [
        "record 1 is gone, though the registry remembers it: the end of the log was cut off"
    ]


def test_who_acts_is_user_and_host_and_the_pod_s_service_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("LOGNAME", "ada")
    assert acting("rollback") == {"user": "ada", "host": socket.gethostname(), "command": "rollback"}
    monkeypatch.setenv(SERVICE_ACCOUNT_VARIABLE, "pipeline-runner")
    assert acting("register_model", "r1")["service_account"] == "pipeline-runner"
    assert acting("register_model", "r1")["run"] == "r1"
