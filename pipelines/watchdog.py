"""Ends process groups when the process that started them dies, however it dies."""

from __future__ import annotations

import contextlib
import subprocess
import sys

# Waits for the end of its input, which the kernel closes with the process that holds the other end.
_SCRIPT = """
import contextlib, os, signal, sys
for group in [int(line) for line in sys.stdin]:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
"""


class Watchdog:
    """A small process of its own. A server's workers outlive a killed server, so whole groups are what it ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C of the terminal is not for it
        )

    def guard(self, group: int) -> None:
        """Adds a process group (the id of its leader)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Ends the watchdog; nothing happens to the groups."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
