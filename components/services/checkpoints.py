"""A training stage's checkpoint on S3: one object, replaced as a whole, under a key that config, inputs and code determine."""

from __future__ import annotations

import time
from typing import Any

from components.rlhf import checkpoint
from components.rlhf.distributed import rank
from components.services.launch import Context


class Checkpoints:
    """Where a stage finds what an earlier attempt at the same work left behind.

    Args:
        context: of the stage.
        name: tells several trainings of one stage apart.
        seconds: how often `due` says yes; 0 means after every update.
    """

    def __init__(self, context: Context, name: str, seconds: float) -> None:
        self._storage = context.storage
        self._uri = context.uri("checkpoints", f"{context.key}/{name}.safetensors")
        self._file = context.scratch / f"checkpoint-{name}.safetensors"
        self._seconds = seconds
        self._saved = time.monotonic()

    def load(self) -> Any | None:
        """The state that was saved last, or None if this work begins."""
        if not self._storage.exists(self._uri):
            return None
        self._storage.download_file(self._uri, self._file)
        state = checkpoint.load(str(self._file))
        self._file.unlink()
        return state

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self._seconds

    def save(self, state: Any) -> None:
        """Replaces the checkpoint; a reader sees the old one or the new one, never a part.

        Of several processes the first writes it.
        """
        if rank() == 0:
            checkpoint.save(state, str(self._file))
            self._storage.upload_file(self._file, self._uri)
            self._file.unlink()
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Removes the checkpoint when its work is published."""
        self._storage.delete(self._uri)
