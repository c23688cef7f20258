"""The graphs as KFP compiles them for a cluster, each compiled once."""

from __future__ import annotations

import json
from functools import cache

from components.images import DATA, TRAIN
from pipelines.policy import Graph
from tests.golden.write import in_cluster

DIGEST = "@sha256:" + "5e" * 32

compiled = cache(in_cluster)


def pushed(graph: str, profile: str) -> Graph:
    """A graph of its own for a test, its images by digest, as they are where an installation names its own."""
    text = json.dumps(compiled(graph, profile))
    for image, name in ((DATA, "rankloop-data"), (TRAIN, "rankloop-train")):
        text = text.replace(json.dumps(image), json.dumps(f"registry.example/{name}{DIGEST}"))
    return Graph(*json.loads(text))
