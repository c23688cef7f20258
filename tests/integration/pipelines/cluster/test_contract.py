"""Every call of `pipelines/cluster` against KFP's published contract, served by Prism: a contract mock, which keeps no state.

Prism refuses a request that breaks the contract: no token, an unknown path, a wrong type. The call for logs is in no contract.
It is installed by `make prism` (npm); where there is no npm, these tests are skipped.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.arguments import Sources
from pipelines.cluster import versions
from pipelines.cluster.connection import Address, Connection, Refused
from pipelines.cluster.schedules import create, ours, remove
from pipelines.cluster.status import newest_runs, run_of, tasks_of
from pipelines.cluster.submit import Order, create_run, experiment_of
from pipelines.cluster.trigger import run_named
from pipelines.cluster.versions import Version, upload
from pipelines.profile import load
from pipelines.resources import load as load_resources
from tests.unit.pipelines.cluster.test_schedules import wish

CONTRACT = Path(__file__).parents[3] / "kfp_contract" / "kfp_api_single_file.swagger.json"
PRISM = Path(os.environ.get("PRISM", "") or Path(sys.prefix) / "prism" / "node_modules" / ".bin" / "prism")


@pytest.fixture(scope="module")
def prism() -> Iterator[str]:
    """Its address."""
    if not PRISM.exists():
        pytest.skip("Prism is not installed: make prism")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PRISM), "mock", "-h", "127.0.0.1", "-p", str(port), str(CONTRACT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "Prism ended"
                assert time.monotonic() < until, "Prism does not listen"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def kfp(prism: str, monkeypatch: pytest.MonkeyPatch) -> Connection:
    monkeypatch.setenv("RANKLOOP_KFP_TOKEN", "any")
    connection = Connection.of(Address(prism))

    # Each page of the mock says that there is another one, with the same token; a real server's last page has none.
    def first_page(what: str, call: Any, field: str, **options: Any) -> list[Any]:
        return list(getattr(connection.ask(what, call, page_size=100, page_token="", **options), field) or ())

    monkeypatch.setattr(connection, "pages", first_page)
    return connection


def test_without_a_token_the_contract_refuses(prism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKLOOP_KFP_TOKEN", raising=False)
    with pytest.raises(Refused, match="401"):
        run_of(Connection.of(Address(prism)), "r1")


def test_what_breaks_the_contract_is_refused(kfp: Connection) -> None:
    call = kfp.client.recurring_runs.recurring_run_service_create_recurring_run
    with pytest.raises(Refused, match=r"\((422|400)\)"):
        kfp.ask("a schedule", call, {"display_name": 5, "max_concurrency": "1"}, again=False)


def test_the_namespace_is_asked_for(kfp: Connection) -> None:
    assert kfp.namespace == "rankloop", "the mock's example serves many"


def test_a_graph_is_uploaded(kfp: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"root": {"dag": {"tasks": {}}}, "components": {}, "pipelineInfo": {"name": "rlhf"}}
    monkeypatch.setattr(versions, "_package", lambda *_: yaml.safe_dump(small).encode())
    made = upload(kfp, "rlhf", load_resources("lean"), True)
    assert made.uploaded
    assert made.version_id == "string", "the mock's example"


def test_a_run_is_created_found_and_read(kfp: Connection) -> None:
    order = Order("rlhf", load("tiny"), Sources("s3://a/b", "", ""), load_resources("lean"))
    parameters = {"rankings": "s3://a/b", "train_sft_config": load("tiny").stages["train_sft"]}
    assert create_run(kfp, order, Version("p", "v", "rlhf-1", False), parameters, "nightly").run_id
    assert run_named(kfp, "nightly") == "", "the mock's example has another name"
    assert newest_runs(kfp, 10, experiment_of(kfp, "rankloop"))
    assert tasks_of(run_of(kfp, "r1"))


def test_schedules_are_listed_created_and_deleted(kfp: Connection) -> None:
    assert ours(kfp) == {}, "the mock's example is not ours"
    create(kfp, wish(method="ppo", config={"seed": 1, "rate": 0.5}))
    remove(kfp, "r1")
