"""Runs a stage in several processes: those of this pod by torchrun, those of several nodes as a Kubeflow TrainJob.

The stage that was started (by KFP, or by hand) does not train itself then. It opens the MLflow run, starts the processes, waits,
and ends as they do: with the outputs of the first, or with the failure of that which failed first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
import types
import uuid
from typing import Any, Protocol

import psutil

from components.services.exits import EXIT_DO_NOT_RETRY, EXIT_INTERRUPTED, EXIT_RETRY, DoNotRetry, Retry, StageFailure
from components.services.job import JOB_VARIABLE, Job, Outcome
from components.services.launch import Context, Settings

TRAINER_VARIABLE = "RANKLOOP_TRAINER"  # "kubernetes", "container" or "local": the processes of one node, too, are a TrainJob there
LOOK_SECONDS = 0.2

_log = logging.getLogger(__name__)


class Processes(Protocol):
    """Processes that run a job."""

    def running(self) -> bool: ...

    def stop(self) -> None:
        """Asks them to save a checkpoint and leave."""

    def said(self) -> str:
        """What is known of how they ended, besides what they say themselves."""

    def close(self) -> None:
        """Leaves nothing running."""


class ProcessFailed(Exception):
    """A process failed in a way that its stage has no code for; its own log has the traceback."""


def run_together(module: types.ModuleType, config: Settings, inputs: Settings, context: Context) -> Any:
    """The stage's outputs, as `module.run` gives them, from several processes.

    Raises:
        StageFailure, ProcessFailed, KeyboardInterrupt: as the process that failed first.
    """
    outcomes = context.uri("checkpoints", f"{context.key}/processes-{uuid.uuid4().hex}")
    job = Job(
        name=f"rankloop-{context.key[:16]}",
        stage=context.stage,
        config=context.config,
        inputs=context.inputs,
        root=context.root,
        outcomes=outcomes,
        run_id=context.tracker.run_id,
    )
    started = _start(job)
    try:
        with context.deferred_stop() as stop:
            told = False
            while started.running():
                if stop.is_set() and not told:
                    started.stop()
                    told = True
                time.sleep(LOOK_SECONDS)
        said = {item.uri.rpartition("/")[2]: item.uri for item in context.storage.list(outcomes + "/")}
        ends = [Outcome(**context.storage.get_json(uri)) for name, uri in said.items() if name.endswith(".json")]
        first = next((end for end in ends if end.rank == 0 and end.exit_code == 0), None)
        if first is None or any(end.exit_code for end in ends):
            if stop.is_set() and all(end.exit_code < 0 for end in ends):  # so early that they knew no signal yet
                context.leave()
            raise failure(ends, int(job.config["processes"]) * int(job.config["nodes"]), started.said())
        for name in first.pages:
            page = context.scratch / name
            context.storage.download_file(said[name], page)
            context.pages.append(page)
        context.summary.update(first.summary)
        return module.Outputs(**first.outputs)
    finally:
        started.close()
        try:
            for item in list(context.storage.list(outcomes + "/")):
                context.storage.delete(item.uri)
        except StageFailure as unreachable:  # the stage ends as it would without them
            _log.warning("%s is left behind: %s", outcomes, unreachable.message)


def failure(ends: list[Outcome], processes: int, said: str) -> BaseException:
    """What the stage fails with: the earliest failure that is no echo of another's, or else the process that was killed.

    Args:
        ends: what processes said; one that was killed has minus a signal's number as its exit code.
        processes: how many there were.
        said: what is known besides.
    """
    killed = [end for end in ends if end.exit_code < 0]
    failed = sorted((end for end in ends if end.exit_code > 0), key=lambda end: (end.lost_contact, end.time))
    if failed and not failed[0].lost_contact:
        return _as_raised(failed[0], processes)
    if killed:
        names = ", ".join(f"process {end.rank} of {processes} was killed by {end.message}" for end in killed)
        return Retry(names, "if it was SIGKILL, look for too little memory; run again: it continues from its checkpoint")
    silent = sorted(set(range(processes)) - {end.rank for end in ends})
    gone = f"of {processes} processes {', '.join(map(str, silent))} ended without a word" if silent else "no process published"
    return Retry(f"{gone}; {said}", "look at their log; run again: it continues from the last checkpoint")


def _as_raised(end: Outcome, processes: int) -> BaseException:
    if end.exit_code == EXIT_INTERRUPTED:
        return KeyboardInterrupt()
    kinds = {EXIT_RETRY: Retry, EXIT_DO_NOT_RETRY: DoNotRetry}
    if end.exit_code in kinds:
        return kinds[end.exit_code](end.message, end.remedy)
    return ProcessFailed(f"process {end.rank} of {processes}: {end.message}")


def _start(job: Job) -> Processes:
    backend = os.environ.get(TRAINER_VARIABLE, "")
    if backend or job.config["nodes"] > 1:
        from components.services.train_job import TrainJob  # where the SDK is needed

        return TrainJob(job, backend or "kubernetes")
    return Node(job)


class Node:
    """The processes of this pod, started by `components.services.node`."""

    def __init__(self, job: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "components.services.node"],
            env={**os.environ, JOB_VARIABLE: job.model_dump_json()},
            start_new_session=True,  # Ctrl-C on a terminal reaches the stage alone, which tells them once
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Tells the processes themselves: torchrun would kill them after the time that it gives to the echo of a failure."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            parent = psutil.Process(self._process.pid)
            for process in parent.children() or [parent]:
                process.terminate()

    def said(self) -> str:
        return f"torchrun ended with code {self._process.poll()}"

    def close(self) -> None:
        if self.running():
            self._process.kill()  # they die with it
            self._process.wait()
