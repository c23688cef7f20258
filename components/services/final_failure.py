"""A failure that no retry can help, kept for the attempts after it: they end at once, with the same message.

KFP 2.17 retries a task after any failure. It has no policy by exit code, and could not have one: its launcher ends with 1 whatever
the stage ended with. So the attempt that fails for good says so on S3, under the run's name and a digest of the stage's
configuration, inputs and code; what runs under the same name again reads it before it imports anything large.

Without `RANKLOOP_RUN_ID`, that is outside of a cluster, there are no retries and nothing is kept.
"""

from __future__ import annotations

import logging
import os
import re

from components.services.exits import DoNotRetry, StageFailure
from components.services.storage import Storage, join

RUN_VARIABLE = "RANKLOOP_RUN_ID"  # the pipeline run's id: the pod's label pipeline/runid
NODE_VARIABLE = "RANKLOOP_NODE_NAME"  # Argo's name of the pod's node, from its annotation; it ends in "(1)" on the first retry
FOLDER = "final-failures"

_log = logging.getLogger(__name__)


def pipeline_run() -> str:
    """What names the pipeline run: its id, or the name of Argo's workflow; "" outside of a cluster."""
    return os.environ.get(RUN_VARIABLE, "") or os.environ.get(NODE_VARIABLE, "").partition(".")[0]


def is_retry() -> bool:
    """Whether Argo made this pod because an attempt before it failed.

    A person who has the whole run tried again, after mending what was wrong, gets first attempts. Where Argo's name of the pod is
    not known, it counts as a retry.
    """
    name = os.environ.get(NODE_VARIABLE, "")
    attempt = re.search(r"\((\d+)\)$", name)
    return int(attempt[1]) > 0 if attempt else not name


class FinalFailure:
    """The record of one stage's final failure in this pipeline run.

    Args:
        root: the `s3://` URI below which every artifact lies.
        key: names the stage's work: its configuration, inputs and code.
    """

    def __init__(self, root: str, stage: str, key: str) -> None:
        run = re.sub(r"[^A-Za-z0-9._-]", "-", pipeline_run())
        self._uri = join(root, FOLDER, run, f"{stage}-{key}.json") if run and root.startswith("s3://") else ""
        self._stage = stage
        self._known = False

    def check(self) -> None:
        """Ends a retry whose attempt before failed for good; the first attempt removes what an older try left.

        A store that cannot be asked is no reason to stop: the stage itself will say what is wrong with it.

        Raises:
            DoNotRetry: the message of the attempt that failed.
        """
        if not self._uri:
            return
        try:
            storage = Storage()
            if not storage.exists(self._uri):
                return
            if not is_retry():
                storage.delete(self._uri)
                return
            message = str(storage.get_json(self._uri)["message"])
        except StageFailure as error:
            _log.warning("whether an attempt before failed for good is not known: %s", error.message)
            return
        self._known = True
        raise DoNotRetry(message)

    def keep(self, message: str) -> None:
        """Records why no retry can help."""
        if not self._uri or self._known:
            return
        try:
            Storage().put_json(self._uri, {"stage": self._stage, "message": message})
        except StageFailure as error:
            _log.warning("retries will not know that this failure is final: %s", error.message)
