"""How a stage ends: two kinds of failure that tell the scheduler whether a retry can help.

The codes are those of BSD's `sysexits.h`, so that they do not collide with the shell's or Python's own (1, 2, 126-165).
"""

from __future__ import annotations

EXIT_USAGE = 2  # the command line is wrong; what click and argparse use too
EXIT_DO_NOT_RETRY = 65  # EX_DATAERR: bad data or configuration, diverged, gate failed: the same run fails the same way
EXIT_RETRY = 75  # EX_TEMPFAIL: preempted, network, service down, disk full: the same run may succeed later
EXIT_INTERRUPTED = 130  # SIGINT, as a shell reports it


class StageFailure(Exception):
    """A failure with a message for a person: what was found, where, and what to do."""

    exit_code = EXIT_DO_NOT_RETRY

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class DoNotRetry(StageFailure):
    """Bad data, bad configuration, divergence or a failed gate. Running it again gives the same failure."""


class Retry(StageFailure):
    """Preempted, or a service could not be reached. Running it again may succeed, from the last checkpoint."""

    exit_code = EXIT_RETRY
