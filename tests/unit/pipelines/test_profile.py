"""Profiles: resolved completely, checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.services.exits import DoNotRetry
from pipelines import STAGES, WATCH, stages_of
from pipelines.profile import load, names


@pytest.mark.parametrize("name", names())
def test_each_profile_of_ours_loads_with_every_setting_of_every_stage(name: str) -> None:
    profile = load(name)
    assert tuple(profile.stages) == (*STAGES, WATCH)
    assert profile.description
    assert profile.stages["ppo_finetune"]["gamma"] == 1.0, "a default that no profile names is resolved"


def test_an_assignment_has_its_settings_own_type() -> None:
    profile = load(
        "tiny", ["ppo_finetune.updates=7", "ppo_finetune.beta=0.5", "ppo_finetune.whiten_rewards=true", "train_sft.base_model=12"]
    )
    chosen = profile.stages["ppo_finetune"]
    assert (chosen["updates"], chosen["beta"], chosen["whiten_rewards"]) == (7, 0.5, True)
    assert profile.stages["train_sft"]["base_model"] == "12", "a text stays a text"


def test_the_seed_reaches_every_stage_that_has_one_and_the_simulation() -> None:
    profile = load("tiny", seed=5)
    assert [s for s in STAGES if profile.stages[s].get("seed") == 5] == [
        "train_sft",
        "train_reward_model",
        "rater_study",
        "ppo_finetune",
        "dpo_finetune",
        "evaluate",
    ]
    assert profile.simulated is not None
    assert profile.simulated.seed == 5


def test_the_method_is_the_profiles_or_the_one_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: both", encoding="utf-8")
    assert [load("tiny").method, load(str(path)).method, load(str(path), method="dpo").method] == ["ppo", "both", "dpo"]


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: ppo2", encoding="utf-8")
    for load_it in (lambda: load("tiny", method="ppo2"), lambda: load(str(path))):
        with pytest.raises(DoNotRetry, match=r"unknown method 'ppo2'; did you mean 'ppo'\? Known: ppo, dpo, both"):
            load_it()


def test_a_run_has_the_stages_of_its_method_only() -> None:
    assert set(STAGES) - set(stages_of("both")) == {"rater_study"}
    assert set(STAGES) - set(stages_of("ppo")) == {"rater_study", "dpo_finetune"}
    assert set(STAGES) - set(stages_of("dpo")) == {"rater_study", "ppo_finetune"}


def test_the_simulation_can_be_set() -> None:
    profile = load("tiny", ["simulated.rankings=10"])
    assert profile.simulated is not None
    assert profile.simulated.rankings == 10


def test_what_holds_for_simulated_rankings_does_not_hold_for_ones_own(tmp_path: Path) -> None:
    """Real raters are hashed, real rankings are not called simulated, and no grammar is taken for the truth about them."""
    simulated, own = load("tiny"), load("tiny", own_rankings=True)
    reading, judging = simulated.stages["ingest_rankings"], simulated.stages["evaluate"]
    assert (reading["source"], reading["rater_ids"]) == ("simulated", "kept")
    assert (judging["truth"], judging["group_by"]) == ("simulated", "simulated")
    reading, judging = own.stages["ingest_rankings"], own.stages["evaluate"]
    assert (reading["source"], reading["rater_ids"]) == ("unspecified", "hashed")
    assert (judging["truth"], judging["group_by"], judging["threads"]) == ("none", "source", 2)
    assert load("tiny", ["evaluate.truth=none"]).stages["evaluate"]["truth"] == "none", "what is set by hand goes before"

    path = tmp_path / "mine.yaml"
    path.write_text("simulated: {evaluate: 3}", encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"simulated.evaluate = 3: no settings"):
        load(str(path))
    path.write_text("simulated: {evaluate: {truht: none}}", encoding="utf-8")
    with pytest.raises(DoNotRetry, match=r"evaluate.truht: there is no such key"):
        load(str(path))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("ppo_finetune.updates", "write --set stage.key=value"),
        ("updates=3", "write --set stage.key=value"),
        ("ppo.updates=3", "unknown stage 'ppo'"),
        ("ppo_finetun.updates=3", "did you mean 'ppo_finetune'?"),
        ("ppo_finetune.update=3", "did you mean 'updates'?"),
        ("ppo_finetune.updates=many", "ppo_finetune.updates = 'many'"),
        ("ppo_finetune.updates=2.5", "ppo_finetune.updates = 2.5"),
        ("ppo_finetune.updates=0", "ppo_finetune.updates = 0"),
        ("ppo_finetune.beta=NaN", "ppo_finetune.beta"),
        ("simulated.ranking=3", "simulated.ranking: there is no such key"),
    ],
)
def test_a_wrong_assignment_is_named_with_its_remedy(assignment: str, expected: str) -> None:
    with pytest.raises(DoNotRetry) as failure:
        load("tiny", [assignment])
    assert expected in str(failure.value)


def test_an_unknown_profile_names_those_that_there_are() -> None:
    with pytest.raises(DoNotRetry, match=r"unknown profile 'tinny'; did you mean 'tiny'\? Known: llm-1b, llm-8b, smollm2, tiny"):
        load("tinny")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train_sft: {epochs: 1", "is not YAML"),
        ("train_sft: {epochs: 2020-99-99}", "is not YAML"),
        ("train_sft: {epochs: 1}\ntrain_sft: {epochs: 2}", "the key 'train_sft' stands twice"),
        ("train_sft: {epochs: 1,\n  epochs: 2}", "line 2, column 3"),
        ("[1, 2]", "is not a profile"),
        ("train_sft: 3", "is not a profile"),
        ("train_sfd: {epochs: 1}", "did you mean 'train_sft'?"),
        ("train_sft: {epoch: 1}", "train_sft.epoch: there is no such key"),
    ],
)
def test_a_broken_profile_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DoNotRetry) as failure:
        load(str(path))
    assert expected in str(failure.value)
