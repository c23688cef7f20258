"""What an image runs first: it passes signals on, waits for all who must still save, and says when the kernel killed a stage.

`python -m components.services.first_process COMMAND...` runs the command as its child and ends with its exit code.

KFP runs a stage below a shell (`sh -ec ... python3 -m kfp.dsl.executor_main`). As process 1 that shell ignores SIGTERM, and the
stage is killed at the end of the grace period with nothing saved. Below `tini` the shell dies of SIGTERM, tini ends with its only
child, and the kernel kills the stage at once; with `tini -g` the stage hears the signal, but tini still does not wait for it.
So this process, once a signal came, waits until every descendant has ended, and takes the exit code of the stage, not of the shell.

It also makes an out-of-memory kill plain: KFP's DockerRunner shows only `FAILURE`, and the shell only `Killed`. In a Kubernetes pod
KFP's launcher takes this place, and Kubernetes itself says `OOMKilled`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import types
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: orphans below become children of this process, also where it is not process 1
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
KILLED = 128 + signal.SIGKILL
CGROUP = Path("/sys/fs/cgroup")


def run(command: list[str], cgroup: Path = CGROUP) -> int:
    """Runs the command to its end, with all its descendants if a signal came; gives the exit code, as a shell reports it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child, came = 0, list[int]()

    def pass_on(number: int, frame: types.FrameType | None = None) -> None:
        came.append(number)
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    kills = oom_kills(cgroup)
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setpgroup=0)
        for number in list(came):  # those that came too early
            pass_on(number)
        code = _wait(child, came)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == KILLED:
        print(_why_killed(oom_kills(cgroup) - kills, cgroup), file=sys.stderr, flush=True)
    return code


def _wait(child: int, came: list[int]) -> int:
    """The exit code of the child; of the stage that outlives it, where a signal ended the child first."""
    code, orphans = KILLED, list[int]()
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:  # nobody is left
            return next((each for each in orphans if 0 < each < 128), max(orphans, default=code))
        ended = os.waitstatus_to_exitcode(status)
        ended = 128 - ended if ended < 0 else ended
        if pid == child:
            code = ended
            if not came:
                return code
        else:
            orphans.append(ended)


def oom_kills(cgroup: Path = CGROUP) -> int:
    """How many processes of this container the kernel has killed for want of memory; 0 where it does not tell."""
    for name in ("memory.events", "memory/memory.oom_control"):  # version 2, version 1
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", (cgroup / name).read_text(encoding="ascii"), re.M)
            return int(found[1]) if found else 0
    return 0


def memory_limit(cgroup: Path = CGROUP) -> str:
    """The container's memory limit, for a person."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return f"{int((cgroup / name).read_text(encoding='ascii')) / 2**20:.0f} MiB"
    return "unknown"


def _why_killed(kills: int, cgroup: Path) -> str:
    if not kills:
        return "the stage was killed (SIGKILL) from outside; its container did not reach its own memory limit"
    return (
        f"OOMKilled: the kernel killed the stage, which needed more than its container's memory limit of {memory_limit(cgroup)}\n"
        "  remedy: give the stage more memory, or a smaller batch; what it saved before is used when it runs again"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m components.services.first_process COMMAND...")
    sys.exit(run(sys.argv[1:]))
