"""The looks at one champion, kept on S3: how much of its error budget evaluations have spent (components/rlhf/error_budget.py).

    <root>/looks/<policy>/<version of the champion, or "first">/looks.json

Before there is a champion, all evaluations of a policy share the place "first", whatever SFT they start from. A look is written
down before anything is measured, so that a result that somebody did not like cannot be forgotten. The same evaluation, by its key,
is one look, however often it is retried. Deleting the file forgets what was spent.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from components.rlhf.error_budget import Look, next_look
from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage

ATTEMPTS = 20  # at writing, while other evaluations do


def take_look(storage: Storage, uri: str, evaluation: str, candidate_uri: str, budget: float, spend: bool = True) -> Look:
    """The look of this evaluation, which is put on the list unless it is there.

    Args:
        uri: of looks.json.
        evaluation: key of the evaluation; another seed, other prompts, another candidate or other code are another look.
        candidate_uri: for people who read the list.
        budget: error for all looks.
        spend: False for an evaluation that cannot pass: it is no look, has no error to spend, and is not put on the list.

    Raises:
        DoNotRetry: what is at `uri` is no list of looks.
        Retry: others write there all the time.
    """
    for _ in range(ATTEMPTS):
        data, etag = storage.get_version(uri)[:2] if storage.exists(uri) else (b"[]", "")
        looks = _parse(data, uri)
        for each in looks:
            if each["evaluation"] == evaluation:
                return Look(int(each["number"]), float(each["alpha"]), float(each["spent"]), float(each["budget"]))
        spent = [each["alpha"] for each in looks]
        if not spend:
            return Look(len(looks), 0.0, sum(spent), budget)
        look = next_look(budget, spent)
        entry = {"evaluation": evaluation, "candidate": candidate_uri, "at": datetime.now(UTC).isoformat(), **look._asdict()}
        if storage.put_if(uri, json.dumps([*looks, entry], indent=2, allow_nan=False).encode(), etag):
            return look
    raise Retry(f"{uri} changed {ATTEMPTS} times while this evaluation was to be put on it", "run again")


def _parse(data: bytes, uri: str) -> list[dict[str, Any]]:
    try:
        looks = json.loads(data)
        alphas = [float(each["alpha"]) for each in looks]
        whole = isinstance(looks, list) and all(0 <= alpha < 1 for alpha in alphas)
        if not whole or [each["number"] for each in looks] != list(range(1, len(looks) + 1)):
            raise ValueError("expected a list of looks, numbered from 1, each with the error that it may spend")
        return looks
    except (ValueError, KeyError, TypeError) as error:
        raise DoNotRetry(
            f"{uri} is no list of looks at a champion: {error!r}",
            "put it back from an older version of the object; deleting it forgets what was spent of the error budget",
        ) from error
