"""Starts the processes of one node and watches them: torchrun, as a module that says which process failed first and how.

`python -m components.services.node` starts as many as the job's `processes`. Where torchrun has started this module itself, as in
the pods of a TrainJob, it is one of the processes already.
"""

from __future__ import annotations

import os
import sys
import uuid

from components.services.job import JOB_VARIABLE, Job, Outcome, die_with_parent
from components.services.storage import Storage, join

SHUTDOWN_SECONDS = 30  # that the others have to end after one has failed; then they are killed


def main() -> None:
    if "RANK" in os.environ:
        from components.services.rank import main as run_rank

        run_rank()
        return
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    die_with_parent()
    job = Job.model_validate_json(os.environ[JOB_VARIABLE])
    processes = int(job.config["processes"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # a stage continues from its checkpoint when it is started again, by whoever decides that
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "components.services.rank")
    except ChildFailedError as error:
        for number, failure in error.failures.items():
            if failure.exitcode < 0:  # it could not say anything itself
                said = Outcome(rank=number, exit_code=failure.exitcode, message=failure.signal_name())
                Storage().put_json(join(job.outcomes, f"killed-{number}.json"), said.model_dump())
        sys.exit(1)


if __name__ == "__main__":
    main()
