"""A run's tasks, pods and logs, from what KFP tells of it; the server is the stand-in of `tests/kfp_stand_in.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from components.services.exits import DoNotRetry
from pipelines.cluster import connection
from pipelines.cluster.connection import Address, Connection, Refused
from pipelines.cluster.show import status
from pipelines.cluster.status import log_or_remedy, pods_of, run_of, tasks_of
from pipelines.display import console_of
from tests.kfp_stand_in import StandIn, stand_in


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.01)
    for name in ("RANKLOOP_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with stand_in() as running:
        running.kept["runs"].append(run())
        yield running


def task(name: str, pod: str, start: int, state: str = "SUCCEEDED", children: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    times = {"start_time": f"2026-01-02T03:00:{start:02}Z", "end_time": f"2026-01-02T03:01:{start:02}Z"}
    below = [{"pod_name": each} for each in children]
    return {"display_name": name, "task_id": f"t-{pod}", "pod_name": pod, "state": state, "child_tasks": below, **times, **more}


def run() -> dict[str, Any]:
    """As Argo's nodes are: a driver and an executor a stage, the executor below a node with the stage's name; a retry makes two."""
    failed = {"error": {"code": 2, "message": "pod\nwas deleted"}}
    return {
        "run_id": "r1",
        "display_name": "nightly",
        "state": "FAILED",
        "created_at": "2026-01-02T03:00:00Z",
        "run_details": {
            "task_details": [
                task("executor(1)", "p-e1", 9, "FAILED", **failed),
                task("root", "p-root", 0, children=("p-i", "p-t")),
                task("ingest-rankings-driver", "p-id", 1),
                task("ingest-rankings", "p-i", 2, children=("p-ie",)),
                task("executor", "p-ie", 3),
                task("ppo-finetune-2", "p-t", 5, children=("p-e",)),
                task("executor", "p-e", 6, "FAILED", children=("p-e0", "p-e1")),
                task("executor(0)", "p-e0", 7, "FAILED"),
            ]
        },
    }


def test_an_executor_belongs_to_the_stage_above_it(server: StandIn) -> None:
    found = tasks_of(run_of(Connection.of(Address(server.url)), "r1"))
    assert [(each.stage, each.kind, each.pod) for each in found] == [
        ("root", "other", "p-root"),
        ("ingest_rankings", "driver", "p-id"),
        ("ingest_rankings", "other", "p-i"),
        ("ingest_rankings", "executor", "p-ie"),
        ("ppo_finetune", "other", "p-t"),
        ("ppo_finetune", "executor", "p-e"),
        ("ppo_finetune", "executor", "p-e0"),
        ("ppo_finetune", "executor", "p-e1"),
    ]
    assert (found[-1].error, found[-1].seconds) == ("pod was deleted", 60.0)


def test_the_stages_and_why_one_failed_are_shown(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    kfp = Connection.of(Address(server.url))
    assert not status(console_of(), kfp, run_of(kfp, "r1"))
    told = capsys.readouterr().out
    assert "nightly: failed, created 2026-01-02 03:00:00 UTC" in told
    assert "✗ ppo_finetune" in told
    assert "ppo_finetune: pod was deleted" in told
    assert f"page     {server.url}/#/runs/details/r1" in told


def test_logs_of_a_stage_are_those_of_its_pods(server: StandIn) -> None:
    kfp = Connection.of(Address(server.url))
    server.logs = {"p-e0": "one\ntwo\n", "p-e1": "three"}
    pods = [each.pod for each in pods_of(run_of(kfp, "r1"), "ppo-finetune")]
    assert pods == ["p-e0", "p-e1"], "nodes above them have no log"
    lines = [line for pod in pods for line in log_or_remedy(kfp, "r1", pod, False)]
    assert lines == ["one", "two", "three"]
    assert "GET /apis/v1alpha1/runs/r1/nodes/p-e0/log" in server.asked


def test_a_log_that_is_gone_says_how_to_ask_kubernetes(server: StandIn) -> None:
    kfp = Connection.of(Address(server.url))
    with pytest.raises(DoNotRetry, match=r"pods p-e0 not found\n  remedy: kubectl -n kubeflow logs p-e0 -c main"):
        list(log_or_remedy(kfp, "r1", "p-e0", False))


def test_a_token_is_needed_for_logs_too(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token, server.logs = "right", {"p-e0": "one"}
    with pytest.raises(Refused, match="401"):
        list(log_or_remedy(Connection.of(Address(server.url)), "r1", "p-e0", False))
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", "right")
    assert list(log_or_remedy(Connection.of(Address(server.url)), "r1", "p-e0", False)) == ["one"]


@pytest.mark.parametrize(("stage", "told"), [("train_sft", "has no pod of train_sft; it has: ingest_rankings, ppo_finetune")])
def test_a_stage_without_a_pod_is_told(stage: str, told: str, server: StandIn) -> None:
    with pytest.raises(DoNotRetry, match=told):
        pods_of(run_of(Connection.of(Address(server.url)), "r1"), stage)


def test_what_is_no_id_is_not_asked_for(server: StandIn) -> None:
    with pytest.raises(DoNotRetry, match="is no id of a run"):
        run_of(Connection.of(Address(server.url)), "../pipelines")
    assert not server.asked
