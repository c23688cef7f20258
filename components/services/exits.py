"""How a stage ends: two kinds of failure that tell the scheduler whether a retry can help.

The codes are those of BSD's `sysexits.h`, so that they do not collide with the shell's or Python's own (1, 2, 126-165).
"""

from __future__ import annotations

import errno
import logging
import tempfile

_log = logging.getLogger(__name__)

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


def code_and_message(error: BaseException) -> tuple[int, str]:
    """The exit code of a failure and what a person is told; one that nobody foresaw is logged with its traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or tempfile.gettempdir()
        error = Retry(f"no space left on device: {where}", "free disk space (TMPDIR moves the scratch folder), then run again")
    if isinstance(error, StageFailure):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    _log.error("unexpected failure", exc_info=error)
    return 1, f"{type(error).__name__}: {error}"
