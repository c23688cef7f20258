"""`python -m components.services.stop`: asks the stage of this pod to save its checkpoint and leave, and waits until it has.

A pod's preStop hook. Without it a stage has about one second between SIGTERM and the end: Argo's executor hands the signal to KFP's
launcher and to the stage alike, the launcher dies of it, and the container with it. A hook runs before the signal, for as long as
the pod's grace period.

The stage writes its process id to the file that `RANKLOOP_PID_FILE` names, while it runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

PID_VARIABLE = "RANKLOOP_PID_FILE"
LONGEST_SECONDS = 3600.0  # the kubelet ends the hook, and the pod, with the grace period


def announce() -> None:
    """Writes this process's id to the file, if one is named."""
    path = os.environ.get(PID_VARIABLE, "")
    if path:
        Path(path).write_text(str(os.getpid()), encoding="ascii")


def withdraw() -> None:
    """Removes the file."""
    path = os.environ.get(PID_VARIABLE, "")
    if path:
        Path(path).unlink(missing_ok=True)


def stop(path: Path, longest_seconds: float = LONGEST_SECONDS) -> bool:
    """Sends SIGTERM to the process in the file and waits for its end; False if no stage runs, or it outlives the time."""
    try:
        process = int(path.read_text(encoding="ascii"))
        os.kill(process, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    deadline = time.monotonic() + longest_seconds
    while time.monotonic() < deadline:
        if _ended(process):
            return True
        time.sleep(0.1)
    return False


def _ended(process: int) -> bool:
    """Whether it is gone, or dead and only waits for its parent to ask (a zombie)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


if __name__ == "__main__":
    named = os.environ.get(PID_VARIABLE, "")
    if not named:
        sys.exit(f"{PID_VARIABLE} is not set: no stage can be asked to stop")
    stop(Path(named))
