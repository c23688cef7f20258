"""Which of a pipeline run's attempts at its work a pod is, and the wait before the next one.

KFP 2.17 retries a task after any failure, with the same waits: they would hold up the end of a run that no retry can help. So KFP
is told to wait a few seconds, and an attempt whose failure may pass waits itself before it ends.
"""

from __future__ import annotations

import logging
import os
import re
import signal

RUN_VARIABLE = "RANKLOOP_RUN_ID"  # the pipeline run's id: the pod's label pipeline/runid
NODE_VARIABLE = "RANKLOOP_NODE_NAME"  # Argo's name of the pod's node, from its annotation; it ends in "(1)" on the first retry
WAITS_VARIABLE = "RANKLOOP_RETRY_WAITS"  # seconds before each retry, in their order: "15 30 60"

_log = logging.getLogger(__name__)


def pipeline_run() -> str:
    """What names the pipeline run: its id, or the name of Argo's workflow; "" outside of a cluster."""
    return os.environ.get(RUN_VARIABLE, "") or os.environ.get(NODE_VARIABLE, "").partition(".")[0]


def is_retry() -> bool:
    """Whether Argo made this pod because an attempt before it failed.

    A person who has the whole run tried again, after mending what was wrong, gets first attempts. Where Argo's name of the pod is
    not known, it counts as a retry.
    """
    number = _number()
    return number > 0 if number is not None else not os.environ.get(NODE_VARIABLE)


def wait_before_retry() -> None:
    """Waits as long as this attempt should before the next one begins; a signal to stop ends it.

    Not after the last attempt, nor where there are none: outside of a cluster, and within ParallelFor.
    """
    waits, number = os.environ.get(WAITS_VARIABLE, "").split(), _number()
    if number is None or number >= len(waits):
        return
    _log.info("waiting %s s: KFP tries again at once (retry %d of %d)", waits[number], number + 1, len(waits))
    stops = (signal.SIGTERM, signal.SIGINT)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    handlers = [signal.signal(each, signal.SIG_DFL) for each in stops]  # one that is ignored might not end the wait
    signal.sigtimedwait(stops, float(waits[number]))
    for each, handler in zip(stops, handlers, strict=True):
        signal.signal(each, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _number() -> int | None:
    """The attempt's number, from 0; None where the pod's name has none."""
    found = re.search(r"\((\d+)\)$", os.environ.get(NODE_VARIABLE, ""))
    return int(found[1]) if found else None
