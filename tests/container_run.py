"""Runs the RLHF graph with KFP's DockerRunner, in a process of its own: `python -m tests.container_run request.json`.

The request holds the graph's arguments, those of every container, and KFP's folder, which each container gets as a volume.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from docker.models.containers import ContainerCollection
from kfp import local

from pipelines.rlhf import rlhf_graph

_run = ContainerCollection.run


def kept(containers: ContainerCollection, *arguments: Any, auto_remove: bool, **options: Any) -> Any:
    """A container that stays when it ends: KFP takes one that is gone before it asks for the exit code for a success."""
    return _run(containers, *arguments, **options)


def main(path: Path) -> None:
    ContainerCollection.run = kept
    request = json.loads(path.read_text(encoding="utf-8"))
    local.init(
        local.DockerRunner(**request["container"]), pipeline_root=request["folder"], raise_on_error=True, enable_caching=False
    )
    rlhf_graph()(**request["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
