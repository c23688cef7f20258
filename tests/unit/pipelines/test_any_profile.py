"""Whatever a person writes into a profile or after `--set`: a complete profile comes of it, or a refusal with a message."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from components.services.exits import DoNotRetry
from pipelines.profile import CONFIGURED as STAGES
from pipelines.profile import Profile, load

KEYS = {stage: set(importlib.import_module(f"components.{stage}.stage").Config.model_fields) for stage in STAGES}
FIELDS = sorted(set().union(*KEYS.values()))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5
)
SECTIONS = st.dictionaries(st.sampled_from([*FIELDS, "rankings"]) | SCALARS, VALUES, max_size=4)
NAMES = st.sampled_from([*STAGES, "description", "method", "simulated"])
PROFILES = st.dictionaries(NAMES | SCALARS, SECTIONS | VALUES, max_size=4).map(yaml.safe_dump)


def loaded(text: str, assignments: list[str]) -> Profile | None:
    """The profile of a file with this text, or None if it is refused with a message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            profile = load(str(path), assignments)
        except DoNotRetry:
            return None
    assert {stage: set(values) for stage, values in profile.stages.items()} == KEYS
    return profile


@settings(max_examples=60, deadline=None)
@given(PROFILES | st.text(max_size=60))
@example("train_sft: {seed: 2020-99-99}")
@example("train_sft: {seed: 0b_}")
@example("train_sft: {seed: !!bool x}")
@example("train_sft: {seed: !!timestamp x}")
@example("train_sft: {seed: " + "1" * 5000 + "}")
@example("train_sft: &a {epochs: *a}")
@example("[" * 3000)
@example("? [1, 2]\n: 3")
@example("1: {}")
@example("description: {a: 1}")
@example("method: [ppo]")
def test_any_text_is_a_complete_profile_or_is_refused(text: str) -> None:
    loaded(text, [])


@settings(max_examples=60, deadline=None)
@given(
    st.builds("{}.{}={}".format, st.sampled_from([*STAGES, "simulated"]), st.sampled_from(FIELDS), VALUES | st.text(max_size=12))
    | st.text(max_size=30)
)
@example("ppo_finetune.updates=" + "1" * 5000)
@example("ppo_finetune.updates=" + "[" * 100_000)
@example("train_sft.base_model=\ud800")
@example("simulated.rankings={}")
def test_any_assignment_sets_a_key_that_there_is_or_is_refused(assignment: str) -> None:
    if loaded("simulated: {rankings: 7}", [assignment]):
        stage, _, key = assignment.partition("=")[0].partition(".")
        assert key in (KEYS[stage] if stage in KEYS else {"rankings", "seed"})


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody/x.yaml", "", "."])
def test_any_name_that_is_no_profile_is_refused(name: str) -> None:
    with pytest.raises(DoNotRetry, match="unknown profile"):
        load(name)
