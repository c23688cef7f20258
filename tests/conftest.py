"""Real servers for the integration and system tests: one SeaweedFS and one MLflow per test session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipelines.local_services import LocalServices, environment_of


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """Both servers, with their addresses and credentials in the environment."""
    os.environ.pop("MLFLOW_RUN_ID", None)
    with LocalServices(tmp_path_factory.mktemp("home")) as running, environment_of(running):
        yield running


LONGEST = ("test_run.py", "test_interrupted_loop.py", "test_whole_loops.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: with two workers that take a file each, one would else run on alone at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
