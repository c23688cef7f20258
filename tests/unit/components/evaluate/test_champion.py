"""An unreachable registry is not "no champion"."""

from __future__ import annotations

import socket

import pytest

from components.evaluate.champion import find_champion
from components.services.exits import Retry


def test_registry_that_cannot_be_reached_is_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(Retry, match="MLflow"):
            find_champion("rankloop-policy")


def test_without_a_registry_there_is_no_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert find_champion("rankloop-policy") is None
