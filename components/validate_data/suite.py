"""The expectations, as a Great Expectations suite, and its result as rows that a person and a gate can read."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from components.validate_data.facts import Facts

if TYPE_CHECKING:
    from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult

    from components.validate_data.stage import Config

EXAMPLES = 5  # rows shown of what failed


class Check(NamedTuple):
    """One expectation and what came of it.

    Fields:
        name: what is expected, in a few words.
        observed: the number that was found: of rows that fail, or of the whole snapshot.
        threshold: in words.
        passed: False also where Great Expectations failed to compute it.
        examples: rows that fail, as "ranking_id (rater): value".
    """

    name: str
    observed: float
    threshold: str
    passed: bool
    examples: list[str]


def _rules(config: Config) -> list[tuple[str, str, str, float | None, float | None]]:
    """(name, frame, column, least, most) of every numeric expectation."""
    row, whole = "rankings", "whole"
    return [
        ("at least two completions", row, "completions", 2, None),
        ("ranks are a ranking", row, "ranks_valid", 1, 1),
        ("no empty completion", row, "shortest_completion_characters", 1, None),
        ("no identical completions", row, "identical_completions", 0, 0),
        ("completions not over-long", row, "longest_completion_characters", None, config.max_completion_characters),
        ("no empty message in a prompt", row, "shortest_message_characters", 1, None),
        ("prompts not over-long", row, "prompt_characters", 1, config.max_prompt_characters),
        ("prompts are chats that end with the user", row, "prompt_is_chat", 1, 1),
        ("no prompt in two splits", row, "prompt_splits", 1, 1),
        ("enough rankings", whole, "rankings", config.min_rankings, None),
        ("enough held-out rankings", whole, "test_rankings", config.min_test_rankings, None),
        ("enough prompts", whole, "prompts", config.min_prompts, None),
        ("enough raters", whole, "raters", config.min_raters, None),
        ("few rows in quarantine", whole, "quarantined_fraction", 0, config.max_quarantined_fraction),
        ("few contradictions", whole, "contradiction_fraction", 0, config.max_contradiction_fraction),
        ("few ties", whole, "tie_fraction", 0, config.max_tie_fraction),
    ]


def validate(facts: Facts, config: Config) -> tuple[list[Check], list[ExpectationSuiteValidationResult]]:
    """Runs the suite over both frames; gives the checks in their order, and Great Expectations' own results."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas as pd
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    frames = {"rankings": pd.DataFrame(facts.rankings), "whole": pd.DataFrame([facts.whole])}
    columns = list(frames["rankings"].columns)
    suites: dict[str, list[Any]] = {"rankings": [], "whole": []}
    if len(frames["rankings"]):
        suites["rankings"] += [
            gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True, meta={"name": "schema"}),
            gxe.ExpectColumnValuesToBeUnique(column="ranking_id", meta={"name": "ids are unique"}),
            gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "test"], meta={"name": "splits are train or test"}),
        ]
    for name, frame, column, least, most in _rules(config):
        if frame == "whole":
            expectation = gxe.ExpectColumnMaxToBeBetween(column=column, min_value=least, max_value=most, meta={"name": name})
        elif len(frames["rankings"]):
            expectation = gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, meta={"name": name})
        else:
            continue
        suites[frame].append(expectation)
    source = context.data_sources.add_pandas("snapshot")
    results, checks = [], []
    for frame, expectations in suites.items():
        if not expectations:
            continue
        batch = source.add_dataframe_asset(frame).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(gx.ExpectationSuite(name=frame, expectations=expectations))
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=frame, data=batch, suite=suite))
        result = definition.run(
            batch_parameters={"dataframe": frames[frame]},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["ranking_id"]}
            if frame == "rankings"
            else "SUMMARY",
        )
        results.append(result)
        checks += [_check(each, facts) for each in result.results]
    return checks, results


def _check(result: Any, facts: Facts) -> Check:
    configuration = result.expectation_config
    name, arguments = configuration.meta["name"], configuration.kwargs
    found = result.result or {}
    raised = any(
        isinstance(info, dict) and info.get("raised_exception")
        for info in [result.exception_info or {}, *((result.exception_info or {}).values())]
    )
    threshold = _threshold(arguments)
    if "unexpected_count" in found:
        observed, missing = float(found["unexpected_count"]), int(found.get("missing_count") or 0)
        passed = result.success is True and not raised and missing == 0  # Great Expectations lets missing values pass
        raters = {row["ranking_id"]: row["rater_id"] for row in facts.rankings} if not passed else {}
        examples = [
            f"{row['ranking_id']} ({raters.get(row['ranking_id'])}): {row.get(arguments['column'])}"
            for row in (found.get("unexpected_index_list") or [])[:EXAMPLES]
        ]
        return Check(name, observed, f"rows that fail: 0 ({arguments['column']} {threshold})", passed, examples)
    value = found.get("observed_value")
    observed = float(value) if isinstance(value, (int, float)) else (0.0 if result.success is True else math.nan)
    passed = result.success is True and not raised and math.isfinite(observed)
    examples = facts.contradictions if name == "few contradictions" and not passed else []
    return Check(name, observed, threshold, passed, examples)


def _threshold(arguments: Any) -> str:
    least, most = arguments.get("min_value"), arguments.get("max_value")
    if least is not None and least == most:
        return f"= {least:g}"
    parts = [f">= {least:g}" if least is not None else "", f"<= {most:g}" if most is not None else ""]
    return " and ".join(part for part in parts if part) or "as expected"
