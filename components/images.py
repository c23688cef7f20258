"""Names of the container images that the stages run in; an installation overrides them when it compiles the graph."""

from __future__ import annotations

import os

TRAIN = os.environ.get("RANKLOOP_TRAIN_IMAGE", "rankloop/python-train:0.1.0")
"""Stages that train, sample or score: torch."""
DATA = os.environ.get("RANKLOOP_DATA_IMAGE", "rankloop/python-data:0.1.0")
"""Stages that read, check and close: no torch."""
