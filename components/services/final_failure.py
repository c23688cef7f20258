"""A failure that no retry can help, kept for the attempts after it: they end at once, with the same message.

KFP 2.17 retries a task after any failure. It has no policy by exit code, and could not have one: its launcher ends with 1 whatever
the stage ended with. So the attempt that fails for good says so on S3, under the run's name and a digest of the stage's
configuration, inputs and code; what runs under the same name again reads it before it imports anything large.

Without `RANKLOOP_RUN_ID`, that is outside of a cluster, there are no retries and nothing is kept.
"""

from __future__ import annotations

import logging
import re

from components.services.attempts import is_retry, pipeline_run
from components.services.exits import DoNotRetry, StageFailure
from components.services.storage import Storage, join

FOLDER = "final-failures"

_log = logging.getLogger(__name__)


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
