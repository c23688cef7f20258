"""The compiled graph against its golden shape, and rules that every component keeps."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from pipelines import STAGES
from tests.golden.write import GOLDEN, compiled, shape, text


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return compiled()


def executors(document: dict[str, Any]) -> dict[str, Any]:
    return {name: each["container"] for name, each in document["deploymentSpec"]["executors"].items()}


def test_the_graph_has_its_golden_shape() -> None:
    assert text() == GOLDEN.read_text(encoding="utf-8"), "the graph changed; if it was meant, `make golden` and review the diff"


def test_no_parameter_defaults_to_none(document: dict[str, Any]) -> None:
    defaults = {key: value.get("defaultValue") for key, value in document["root"]["inputDefinitions"]["parameters"].items()}
    assert [key for key, value in defaults.items() if value is None] == ["rankings"], "only rankings is required"


def test_every_stage_of_the_graph_has_a_config_parameter(document: dict[str, Any]) -> None:
    assert {f"{stage}_config" for stage in STAGES} <= set(document["root"]["inputDefinitions"]["parameters"])


def test_wrappers_are_thin(document: dict[str, Any]) -> None:
    for name, container in executors(document).items():
        source = container["command"][-1]
        assert len(source.encode()) < 2048, name
        assert "pip install" not in " ".join(container["command"]), f"{name} installs packages when it runs"


def test_a_value_that_decides_a_branch_is_one_word(document: dict[str, Any]) -> None:
    """A quote, a newline or a number in a compared value makes neither branch of KFP run."""
    import yaml

    lines = yaml.safe_dump(document, width=10_000).replace("''", "'").splitlines()
    compared = re.findall(r"[!=]= '(.*?)'", "\n".join(line for line in lines if "condition:" in line))
    assert Counter(compared) == {"pass": 4, "ppo": 4, "dpo": 3, "both": 1, "on": 1}


def tasks_that_run(tasks: dict[str, Any], method: str, gate: str, study: str = "off") -> set[str]:
    """Names of the tasks whose conditions all hold."""
    values, found = {"method": method, "rater_study": study}, set()
    for name, task in tasks.items():
        when = task["when"] if "parameter_values" in task["when"] else "True"
        when = re.sub(
            r"inputs\.parameter_values\['pipelinechannel--(method|rater_study)?.*?'\]",
            lambda m: repr(values[m[1]] if m[1] else gate),
            when,
        )
        if eval(when.replace("!(", "not (").replace("&&", "and")):
            found |= tasks_that_run(task["tasks"], method, gate, study) if "tasks" in task else {name}
    return found


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("ppo", {"ppo-finetune", "evaluate"}),
        ("dpo", {"dpo-finetune", "evaluate-2"}),
        ("both", {"ppo-finetune-2", "dpo-finetune-2", "evaluate-3"}),
    ],
)
def test_each_method_runs_its_own_stages_once(document: dict[str, Any], method: str, expected: set[str]) -> None:
    around = {"ingest-rankings", "validate-data", "train-sft", "train-reward-model", "register-model", "close-run"}
    assert tasks_that_run(shape(document)["tasks"], method, "pass") == around | expected


@pytest.mark.parametrize("method", ["ppo", "dpo", "both"])
def test_the_study_of_raters_is_one_more_stage_where_it_is_asked_for(document: dict[str, Any], method: str) -> None:
    tasks = shape(document)["tasks"]
    without = tasks_that_run(tasks, method, "pass", "off")
    assert tasks_that_run(tasks, method, "pass", "on") == without | {"rater-study"}
    for other in ("", "yes", "1"):
        assert tasks_that_run(tasks, method, "pass", other) == without
    assert "rater-study" not in tasks_that_run(tasks, method, "fail", "on"), "not on data that failed the gate"


def test_data_that_fail_the_gate_end_the_run(document: dict[str, Any]) -> None:
    expected = {"ingest-rankings", "validate-data", "stop-run-2", "close-run"}
    assert tasks_that_run(shape(document)["tasks"], "ppo", "fail", "off") == expected


@pytest.mark.parametrize("method", ["grpo", "", "PPO"])
def test_an_unknown_method_stops_the_run(document: dict[str, Any], method: str) -> None:
    assert "stop-run" in tasks_that_run(shape(document)["tasks"], method, "pass")


def test_what_depends_on_the_registry_is_never_cached(document: dict[str, Any]) -> None:
    def cached(tasks: dict[str, Any]) -> dict[str, bool]:
        found = {}
        for name, task in tasks.items():
            found |= cached(task["tasks"]) if "tasks" in task else {name: task["cached"]}
        return found

    assert {name for name, yes in cached(shape(document)["tasks"]).items() if yes} == {
        "ingest-rankings",
        "validate-data",
        "train-sft",
        "train-reward-model",
        "rater-study",
        "ppo-finetune",
        "ppo-finetune-2",
        "dpo-finetune",
        "dpo-finetune-2",
    }


def test_mistake_deployment_a_version_is_promoted_after_its_verdict_only(document: dict[str, Any]) -> None:
    """Another project's graph deploys beside its evaluation: nothing connects the two."""
    from tests.golden.write import shape

    def evaluates(name: str, task: dict[str, Any]) -> bool:
        return name.startswith("evaluate") or any(evaluates(*each) for each in task.get("tasks", {}).items())

    found: dict[str, bool] = {}

    def walk(tasks: dict[str, Any], after_a_verdict: bool, when: str) -> None:
        for name, task in tasks.items():
            waits = after_a_verdict or any(evaluates(each, tasks[each]) for each in task["after"])
            condition = task["when"] or when
            if name.startswith("register-model"):
                for key in ("evaluation_uri", "gate"):
                    assert task["inputs"][key].startswith("parent: "), "not a constant"
                found[condition] = waits
            walk(task.get("tasks", {}), waits, condition)

    walk(shape(document)["tasks"], False, "")
    (passed,) = (condition for condition in found if condition.endswith("== 'pass'"))
    assert found == {passed: True, f"!({passed})": True}
