"""One of several processes that run a stage together, as torchrun starts it: `torchrun -m components.services.rank`.

`RANKLOOP_JOB` says what to run. Every process runs the whole stage on the same inputs; where it trains they share the work
(`rlhf.distributed`). The first one alone writes to S3 and MLflow. How each of them ended is an object on S3, which the stage that
started them reads.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as group

from components.rlhf.distributed import any_of, rank, wait_for_all
from components.services.exits import DoNotRetry, Retry, StageFailure, code_and_message
from components.services.job import JOB_VARIABLE, Job, Outcome, die_with_parent
from components.services.launch import STORAGE_VARIABLE, Context, Settings, parse_settings
from components.services.progress import EVENTS_VARIABLE
from components.services.storage import Storage, join

WAIT_SECONDS = 600  # for one that says nothing, as the first while it uploads a checkpoint; a dead one is noticed at once

_log = logging.getLogger(__name__)


class ReadingStorage(Storage):
    """The object store as the other processes have it: they read; what they would write, the first one writes."""

    def put_bytes(self, uri: str, data: bytes) -> None:
        pass

    def delete(self, uri: str) -> None:
        pass

    def upload_file(self, path: Path, uri: str) -> None:
        pass

    def publish_folder(self, folder: Path, uri: str, marker: dict[str, Any]) -> None:
        pass


class RankContext(Context):
    """The stage's context in one of several processes: what ends or skips its work is agreed on."""

    def __init__(self, job: Job, config: Settings, inputs: Settings, scratch: Path) -> None:
        super().__init__(job.stage, config, inputs, scratch)
        if rank() == 0:
            self.tracker.adopt(job.run_id)
        else:
            self.storage = ReadingStorage()

    def published_before(self, *uris: str) -> bool:
        (published,) = any_of(super().published_before(*uris))
        return published and super().published_before(*uris)

    def on_signal(self, number: int, frame: types.FrameType | None) -> None:
        # Told already, it leaves with the others at the end of its step; torchrun tells it again when one of them is gone.
        if not (self._deferred and self._stop.is_set()):
            super().on_signal(number, frame)

    def leave(self, saved: bool = True) -> NoReturn:
        """Leaves a training together with the others: the first may still be saving, and would be stopped when one is gone."""
        if self._deferred:
            _ignore_signals()
            wait_for_all()
        super().leave(saved)


def main() -> None:
    """Runs the job, says how it ended, and exits with the stage's code."""
    die_with_parent()
    first = os.environ["RANK"] == "0"
    if not first:
        os.environ[EVENTS_VARIABLE] = os.devnull
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING,
        format=f"%(asctime)s process {os.environ['RANK']} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    job = Job.model_validate_json(os.environ[JOB_VARIABLE])
    os.environ[STORAGE_VARIABLE] = job.root  # what was made below one root is found below no other
    scratch = Path(tempfile.mkdtemp(prefix=f"rankloop-{job.stage}-"))
    try:
        outcome = _run(job, scratch)
    except BaseException as error:
        _ignore_signals()
        outcome = _failed(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Storage().put_json(join(job.outcomes, f"{outcome.rank}.json"), outcome.model_dump())
    if outcome.exit_code:
        print(f"process {outcome.rank}: {outcome.message}", file=sys.stderr, flush=True)
        os._exit(outcome.exit_code)  # a collective that waits for a lost process would hold the interpreter's end
    group.destroy_process_group()


def _run(job: Job, scratch: Path) -> Outcome:
    _take_device()
    group.init_process_group(timeout=timedelta(seconds=WAIT_SECONDS))
    module = importlib.import_module(f"components.{job.stage}.stage")
    config = parse_settings(module.Config, job.config, job.stage)
    inputs = parse_settings(module.Inputs, job.inputs, job.stage)
    context = RankContext(job, config, inputs, scratch)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, context.on_signal)
    try:
        outputs = module.run(config, inputs, context)
    except BaseException:
        try:
            context.tracker.send_rest("FAILED")
        except StageFailure as unreachable:
            _log.warning("the last metrics are lost: %s", unreachable.message)
        raise
    context.tracker.send_rest("FINISHED")
    if rank() != 0:
        return Outcome(rank=rank())
    for page in context.pages:
        context.storage.upload_file(page, join(job.outcomes, page.name))
    return Outcome(rank=0, outputs=outputs._asdict(), summary=context.summary, pages=[page.name for page in context.pages])


def _failed(error: BaseException) -> Outcome:
    # Gloo has no exception of its own.
    lost = isinstance(error, group.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost:
        _log.warning("lost contact: %s", error)
        error = Retry(f"process {os.environ['RANK']} lost contact with another one", "run again: it continues from its checkpoint")
    code, message = code_and_message(error)
    parts = (error.message, error.remedy) if isinstance(error, StageFailure) else (message, "")
    return Outcome(
        rank=int(os.environ["RANK"]), exit_code=code, message=parts[0], remedy=parts[1], lost_contact=lost, time=time.time()
    )


def _take_device() -> None:
    """Gives each process of a node an accelerator of its own, if there are any.

    Raises:
        DoNotRetry: there are fewer than processes.
    """
    if not torch.accelerator.is_available():
        return
    there, wanted = torch.accelerator.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if there < wanted:
        raise DoNotRetry(
            f"{wanted} processes on a node with {there} accelerators", f"set processes to {there}, or give the pod more"
        )
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def _ignore_signals() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
