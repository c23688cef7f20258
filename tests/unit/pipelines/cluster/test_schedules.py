"""Schedules against the stand-in of `tests/kfp_stand_in.py`, which keeps recurring runs: the plan, and that there are never two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.services.exits import DoNotRetry, Retry
from components.services.launch import json_digest
from pipelines.cluster import connection, schedules
from pipelines.cluster.connection import Address, Connection
from pipelines.cluster.schedules import Wanted, make, ours, plan, read_file
from tests.kfp_stand_in import StandIn, stand_in

SAMPLE = Path(schedules.__file__).with_name("schedules.yaml")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


@pytest.fixture
def kfp(server: StandIn) -> Connection:
    return Connection.of(Address(server.url))


def wish(name: str = "watch", cron: str = "0 0 3 * * *", enabled: bool = True, **parameters: Any) -> Wanted:
    body = {
        "display_name": name,
        "experiment_id": "e",
        "pipeline_version_reference": {"pipeline_id": "p", "pipeline_version_id": "v"},
        "runtime_config": {"parameters": parameters},
        "trigger": {"cron_schedule": {"cron": cron}},
        "mode": "ENABLE" if enabled else "DISABLE",
        "max_concurrency": "1",
        "no_catchup": True,
    }
    shown = {"cron": cron, "enabled": enabled, "version": "drift-watch-1", **parameters}
    return Wanted(name, json_digest(body)[:16], body, shown)


def kept(server: StandIn) -> list[dict[str, Any]]:
    return server.kept["recurringruns"]


def test_what_is_applied_is_there_and_a_second_time_nothing_is_done(server: StandIn, kfp: Connection) -> None:
    wishes = [wish(), wish("other", enabled=False)]
    make(kfp, plan(kfp, wishes, False))
    assert plan(kfp, wishes, False) == []
    first, second = kept(server)
    assert (first["max_concurrency"], first["no_catchup"], first["mode"], second["mode"]) == ("1", True, "ENABLE", "DISABLE")
    assert sum(each.startswith("POST /apis/v2beta1/recurringruns") for each in server.asked) == 2


def test_a_change_is_told_and_made_by_deleting_first(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish(method="ppo", config={"seed": 1, "lr": 2})], False))
    changed = wish(cron="0 0 4 * * *", method="dpo", config={"seed": 2, "lr": 2})
    (step,) = plan(kfp, [changed], False)
    identity = kept(server)[0]["recurring_run_id"]
    assert step.reasons == [
        "~ config.seed: 1 → 2",
        "~ cron: '0 0 3 * * *' → '0 0 4 * * *'",
        "~ method: 'ppo' → 'dpo'",
        f"- recurring run {identity}",
        "+ 0 0 4 * * *, version drift-watch-1",
    ]
    server.asked.clear()
    make(kfp, [step])
    changes = [each for each in server.asked if not each.startswith("GET")]
    assert changes == [f"DELETE /apis/v2beta1/recurringruns/{identity}", "POST /apis/v2beta1/recurringruns"]
    assert plan(kfp, [changed], False) == []


def test_a_crash_between_deleting_and_creating_is_healed_by_the_next_apply(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish()], False))
    changed = wish(cron="0 0 4 * * *")
    server.failures["POST recurringruns"] = (1, 500, False)
    with pytest.raises(Retry, match=r"schedule watch \(500\)"):
        make(kfp, plan(kfp, [changed], False))
    assert kept(server) == [], "none, and not two"
    make(kfp, plan(kfp, [changed], False))
    assert len(kept(server)) == 1
    assert plan(kfp, [changed], False) == []


def test_a_creation_whose_reply_was_lost_is_not_repeated(server: StandIn, kfp: Connection) -> None:
    server.failures["POST recurringruns"] = (1, 504, True)
    make(kfp, plan(kfp, [wish()], False))
    assert len(kept(server)) == 1


def test_of_two_that_are_alike_one_goes_and_what_others_made_stays(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish()], False))
    kept(server).append({**kept(server)[0], "recurring_run_id": "twin"})
    kept(server).append({**kept(server)[0], "recurring_run_id": "foreign", "description": "somebody's own"})
    (step,) = plan(kfp, [wish()], True)
    assert (step.delete, step.create) == (["twin"], None)
    make(kfp, [step])
    assert {each["recurring_run_id"] for each in kept(server)} >= {"foreign"}
    assert len(kept(server)) == 2


def test_one_that_somebody_switched_off_in_kfps_pages_is_switched_on_again(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish()], False))
    kept(server)[0]["status"] = "DISABLED"
    (step,) = plan(kfp, [wish()], False)
    assert step.reasons[0] == "~ enabled: False → True"


def test_what_the_file_does_not_name_goes_only_when_asked(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish(), wish("old")], False))
    assert plan(kfp, [wish()], False) == []
    make(kfp, plan(kfp, [wish()], True))
    assert list(ours(kfp)) == ["watch"]


def test_one_that_somebody_else_deleted_meanwhile_is_deleted(server: StandIn, kfp: Connection) -> None:
    make(kfp, plan(kfp, [wish()], False))
    steps = plan(kfp, [wish(cron="0 0 4 * * *")], False)
    kept(server).clear()
    make(kfp, steps)
    assert len(kept(server)) == 1


def test_recurring_runs_beyond_the_first_page_are_seen(server: StandIn, kfp: Connection) -> None:
    wishes = [wish(f"s{number}") for number in range(7)]
    make(kfp, plan(kfp, wishes, False))
    server.page = 2
    assert plan(kfp, wishes, True) == []


def test_the_sample_is_a_file_of_schedules() -> None:
    said = read_file(SAMPLE)
    watch = said.schedules["drift-watch"]
    assert (watch.graph, watch.enabled, said.schedules["quarterly-retrain"].enabled) == ("drift_watch", True, False)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"schedules": {"a": {"cron": "0 3 * * *", "rankings": "s3://a/b"}}}, "schedules.schedules.a.cron.*has 5 fields, not six"),
        ({"schedules": {"a": {"cron": "0 0 3 * * *"}}}, "schedules.a.rankings.*required"),
        ({"schedules": {"A b": {"cron": "0 0 3 * * *", "rankings": "s3://a/b"}}}, "should match pattern"),
        ({"schedules": {"a": {"cron": "0 0 3 * * *", "rankings": "s3://a/b", "catchup": True}}}, "catchup: there is no such key"),
        ([1], "holds no schedules"),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_is_asked(values: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "schedules.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(DoNotRetry, match=told):
        read_file(tmp_path / "schedules.yaml")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML would keep the second, and the first schedule would be deleted in the cluster."""
    row = '  weekly: {cron: "0 0 3 * * 1", rankings: "s3://a/b"}\n'
    (tmp_path / "schedules.yaml").write_text("schedules:\n" + row + row, encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"schedules.yaml is not YAML: the key 'weekly' stands twice\n.*line 3, column 3"):
        read_file(tmp_path / "schedules.yaml")
