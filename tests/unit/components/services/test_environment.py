"""What a stage sets before torch is imported: defaults, which a user's own values overrule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

NAMES = ("GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
SHOW = f"""
import runpy, sys, os
sys.argv = ["stage", "--help"]
try:
    runpy.run_module("components.stop_run", run_name="__main__")
except SystemExit:
    pass
print([os.environ.get(name) for name in {NAMES!r}])
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["10000", "16", "32"]),
        ({"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "1024", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, ["5", "1024", "0"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, [None, "16", "32"]),
    ],
)
def test_caches_and_waiting_have_defaults_that_a_user_overrules(given: dict[str, str], expected: list[str | None]) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in (*NAMES, "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env={**inherited, **given}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(expected)
