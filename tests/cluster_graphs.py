"""The graphs as KFP compiles them for a cluster, each compiled once."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

from components.images import DATA, TRAIN
from pipelines.policy import Graph
from tests.containers import ROOT

DIGEST = "@sha256:" + "5e" * 32

_COMPILE = "import json, sys; from tests.golden.write import in_cluster; print(json.dumps(in_cluster(*sys.argv[1:])))"


@cache
def compiled(graph: str, profile: str) -> Graph:
    """In a process of its own: KFP looks at every loaded module for each task, ten times as long where transformers is loaded."""
    done = subprocess.run([sys.executable, "-c", _COMPILE, graph, profile], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Graph(*json.loads(done.stdout))


def pushed(graph: str, profile: str) -> Graph:
    """A graph of its own for a test, its images by digest, as they are where an installation names its own."""
    text = json.dumps(compiled(graph, profile))
    for image, name in ((DATA, "rankloop-data"), (TRAIN, "rankloop-train")):
        text = text.replace(json.dumps(image), json.dumps(f"registry.example/{name}{DIGEST}"))
    return Graph(*json.loads(text))
