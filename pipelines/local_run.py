"""Runs a graph with KFP's local runner, in a process of its own: `python -m pipelines.local_run arguments.json`.

The client starts it with the servers' addresses in the environment. KFP's own chatter goes to this process's output, which the
client keeps as the run's log; what a person should see comes as events of the stages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kfp import local

from components.services.launch import code_digest
from pipelines.drift_watch import drift_watch_graph
from pipelines.rlhf import rlhf_graph
from pipelines.sharded_ingest import sharded_ingest_graph

# What builds each graph, for a cluster's table of resources or, without one, for this machine.
GRAPHS = {"rlhf": rlhf_graph, "drift_watch": drift_watch_graph, "sharded_ingest": sharded_ingest_graph}


def main(path: Path) -> None:
    """Runs the graph that the request names, once.

    KFP's local cache keys on a component's source, its image name and its parameters, not on the code that it imports: a cache
    folder of its own for every version of the code makes up for that.
    """
    request = json.loads(path.read_text(encoding="utf-8"))
    home = Path(request["home"])
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(home / "kfp"),
        raise_on_error=True,
        enable_caching=request["caching"],
        cache_root=str(home / "kfp-cache" / code_digest()[:16]),
    )
    GRAPHS[request["graph"]]()(**request["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
