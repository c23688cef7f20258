"""A checkpoint goes when its work is published, also where a kill came between the two."""

import uuid
from pathlib import Path
from typing import Any

import pytest

from components.close_run.stage import Config, Inputs
from components.services.checkpoints import Checkpoints
from components.services.launch import Context
from components.services.storage import Storage, join


@pytest.fixture
def context(services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setenv("RANKLOOP_STORAGE", join(services.storage_root, f"checkpoints-{uuid.uuid4().hex}"))
    return Context("close_run", Config(), Inputs(state="SUCCEEDED"), tmp_path)


def publish(context: Context, name: str) -> str:
    folder, uri = context.scratch / name, context.uri("policies", name)
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    context.storage.publish_folder(folder, uri, context.marker("policy"))
    return uri


def test_work_that_was_published_before_leaves_no_checkpoint(context: Context) -> None:
    checkpoints = Checkpoints(context, "sft", 0)
    checkpoints.save({"step": 3})
    one, other = publish(context, "one"), context.uri("policies", "other")
    assert not context.published_before(one, other)
    assert checkpoints.load() == {"step": 3}, "of two outputs one is missing: the work goes on from here"
    publish(context, "other")
    assert context.published_before(one, other)
    assert not list(Storage().list(context.uri("checkpoints") + "/"))


def test_another_content_behind_the_same_name_is_other_work(context: Context, tmp_path: Path) -> None:
    """A text that was changed between a kill and the next run must not be trained on from the old one's checkpoint."""
    context.depends_on(["first text"])
    Checkpoints(context, "ppo", 0).save({"step": 3})
    again, other = (Context("close_run", Config(), Inputs(state="SUCCEEDED"), tmp_path) for _ in range(2))
    again.depends_on(["first text"])
    other.depends_on(["another text"])
    assert Checkpoints(again, "ppo", 0).load() == {"step": 3}
    assert Checkpoints(other, "ppo", 0).load() is None
    assert other.uri("policies") != again.uri("policies")
