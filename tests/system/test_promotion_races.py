"""Twenty processes promote at once on MLflow with PostgreSQL; `python -m tests.benchmarks.promotion` runs more rounds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipelines.local_services import LocalServices
from tests.benchmarks.promotion import rounds
from tests.postgres import Unavailable, mlflow_on_postgres, programs

ROUNDS, PROCESSES = 3, 20


def test_of_twenty_promotions_at_once_one_wins_each_time(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        programs()
    except Unavailable as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        with mlflow_on_postgres(services, folder) as address:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            assert rounds(ROUNDS, PROCESSES, folder) == []
