"""Evidently's text drift on the streams of `drift.py`, one JSON line each: its package, its defaults, an environment of its own.

    python -m venv venv && venv/bin/pip install evidently==0.7.23 'pandas<3'

Each day is compared with the reference as its `ValueDrift` does by default for text: a classifier on TF-IDF whose AUC must be above
the 95th percentile of random guesses (references of up to 1000 rows). A day is an alarm if prompts or completions drifted.
"""

from __future__ import annotations

import json
import sys
import warnings

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.metrics import ValueDrift

warnings.filterwarnings("ignore")
COLUMNS = ["prompt", "completions"]


def dataset(rows: list[list[str]]) -> Dataset:
    return Dataset.from_pandas(pd.DataFrame(rows, columns=COLUMNS), DataDefinition(text_columns=COLUMNS))


def drifted(reference: Dataset, day: list[list[str]]) -> bool:
    """Whether its own test of any of the columns fails."""
    report = Report([ValueDrift(column=column) for column in COLUMNS], include_tests=True)
    result = report.run(dataset(day), reference)
    return any(test["status"] == "FAIL" for test in result.dict()["tests"])


for line in open(sys.argv[1], encoding="utf-8"):
    job = json.loads(line)
    reference = dataset(job["reference"][:1000])
    alarms: list[bool] = []
    for day in job["days"]:
        alarms.append(drifted(reference, day))
        if alarms[-1] and job["kind"] != "none":
            break  # only the first counts
    print(json.dumps({"kind": job["kind"], "alarms": alarms}), flush=True)
