"""The expectations, as Great Expectations suites, and their results as checks that a person and a gate can read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from components.validate_data.facts import Facts
from components.validate_data.rows import COLUMNS

if TYPE_CHECKING:
    from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult

    from components.validate_data.stage import Config

EXAMPLES = 5  # rows shown of what failed
CHUNK_ROWS = 50_000  # that Great Expectations looks at together; each look costs 0.1 s whatever their number
CHUNKS_KEPT = 3  # of its own results, the failed ones first


class Rule(NamedTuple):
    """An expectation on a number: of every ranking ("rows") or of the snapshot ("whole").

    Fields:
        level: what the gate does where it does not hold: "fail", or "warn" and go on.
        end: what of an interval is compared: its "low" end, its "high" one, or ("bias") how far it is from one half.
    """

    name: str
    frame: str
    column: str
    least: float | None
    most: float | None
    level: str = "fail"
    end: str = ""


class Check(NamedTuple):
    """One expectation and what came of it.

    Fields:
        name: what is expected, in a few words.
        column: the number that was looked at; its name in the settings `warning` and `failing`.
        observed: what was found: rows that fail, or the number of the whole snapshot; NaN where it is not known.
        threshold: in words.
        verdict: "pass", "warn", "fail" or "not known". "fail" also where Great Expectations could not compute it.
        examples: rows that fail, as "ranking_id (rater): value".
        value: what was found in words, with its interval if it has one.
    """

    name: str
    column: str
    observed: float
    threshold: str
    verdict: str
    examples: list[str]
    value: str


def rules(config: Config) -> list[Rule]:
    """Every numeric expectation."""
    found = [
        Rule("at least two completions", "rows", "completions", 2, None),
        Rule("ranks are a ranking", "rows", "ranks_valid", 1, 1),
        Rule("no empty completion", "rows", "shortest_completion_characters", 1, None),
        Rule("no identical completions", "rows", "identical_completions", 0, 0),
        Rule("completions not over-long", "rows", "longest_completion_characters", None, config.max_completion_characters),
        Rule("no empty message in a prompt", "rows", "shortest_message_characters", 1, None),
        Rule("prompts not over-long", "rows", "prompt_characters", 1, config.max_prompt_characters),
        Rule("prompts are chats that end with the user", "rows", "prompt_is_chat", 1, 1),
        Rule("ids are unique", "whole", "repeated_ids", 0, 0),
        Rule("no prompt in two splits", "whole", "leaked_rankings", 0, 0),
        Rule("enough rankings", "whole", "rankings", config.min_rankings, None),
        Rule("enough held-out rankings", "whole", "test_rankings", config.min_test_rankings, None),
        Rule("enough prompts", "whole", "prompts", config.min_prompts, None),
        Rule("enough raters", "whole", "raters", config.min_raters, None),
        Rule("few rows in quarantine", "whole", "quarantined_fraction", 0, config.max_quarantined_fraction),
        Rule("few contradictions", "whole", "contradiction_fraction", 0, config.max_contradiction_fraction),
        Rule("few ties", "whole", "tie_fraction", 0, config.max_tie_fraction),
        *_warnings(config),
    ]
    columns = {rule.column for rule in found}
    if strangers := sorted({*config.warning, *config.failing} - columns):
        raise ValueError(f"validate_data has no check {', '.join(strangers)}; its checks are {', '.join(sorted(columns))}")
    levels = {**dict.fromkeys(config.warning, "warn"), **dict.fromkeys(config.failing, "fail")}
    return [rule._replace(level=levels.get(rule.column, rule.level)) for rule in found]


def _warnings(config: Config) -> list[Rule]:
    """What a team should know but may have reasons for: people do prefer longer answers, and some agree."""

    def few(name: str, column: str, most: float, end: str = "") -> Rule:
        return Rule(name, "whole", column, None, most, "warn", end)

    def enough(name: str, column: str, least: float) -> Rule:
        return Rule(name, "whole", column, least, None, "warn", "high")

    return [
        few("held-out prompts are new", "near_duplicate_fraction", config.max_near_duplicate_fraction, "low"),
        few("length does not decide", "length_bias", config.max_length_bias, "bias"),
        few("being shown first does not decide", "position_bias", config.max_position_bias, "bias"),
        few("refusing does not decide", "refusal_bias", config.max_refusal_bias, "bias"),
        few("raters keep to what they said", "self_contradiction_fraction", config.max_self_contradiction_fraction, "low"),
        few("orderings do not go in circles", "cycle_fraction", config.max_cycle_fraction, "low"),
        enough("raters agree", "agreement", config.min_agreement),
        enough("raters agree beyond chance (alpha)", "alpha", config.min_alpha),
        enough("a reward model can be right", "human_ceiling", config.min_human_ceiling),
        few("no rater is most of the data", "largest_rater_fraction", config.max_rater_fraction),
        few("most rankings are by raters with many", "small_rater_fraction", config.max_small_rater_fraction),
        few("no rater at random level", "random_rater_fraction", config.max_random_rater_fraction),
        few("raters do not copy", "copying_fraction", config.max_copying_fraction),
        few("prompts are in one language", "other_language_fraction", config.max_other_language_fraction, "low"),
        few("few completions refuse", "refusal_fraction", config.max_refusal_fraction),
    ]


class Suite:
    """Runs the expectations: on rows as they come, and on the whole at the end.

    Attributes:
        results: Great Expectations' own, of the whole and of up to `CHUNKS_KEPT` chunks of rows.
    """

    def __init__(self, config: Config) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        import great_expectations as gx
        import great_expectations.expectations as gxe
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self.results: list[ExpectationSuiteValidationResult] = []
        self._rules = rules(config)
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
        self._source = self._context.data_sources.add_pandas("snapshot")
        self._row_checks: dict[str, Check] = {}
        self._chunk: list[pd.DataFrame] = []
        self._chunk_rows = 0
        on_rows = [
            gxe.ExpectTableColumnsToMatchSet(column_set=list(COLUMNS), exact_match=True, meta={"name": "schema"}),
            gxe.ExpectColumnValuesToNotBeNull(column="ranking_id", meta={"name": "rankings have an id"}),
            gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "test"], meta={"name": "splits are train or test"}),
            *(
                gxe.ExpectColumnValuesToBeBetween(
                    column=rule.column, min_value=rule.least, max_value=rule.most, meta={"name": rule.name}
                )
                for rule in self._rules
                if rule.frame == "rows"
            ),
        ]
        self._on_rows = self._definition("rankings", on_rows)

    def _definition(self, name: str, expectations: list[Any]) -> Any:
        import great_expectations as gx

        batch = self._source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        suite = self._context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        return self._context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))

    def look(self, frame: pd.DataFrame) -> None:
        """Takes rows with `rows.COLUMNS`."""
        self._chunk.append(frame)
        self._chunk_rows += len(frame)
        if self._chunk_rows >= CHUNK_ROWS:
            self._validate_rows()

    def _validate_rows(self) -> None:
        frame = pd.concat(self._chunk, ignore_index=True)
        self._chunk, self._chunk_rows = [], 0
        result = self._on_rows.run(
            batch_parameters={"dataframe": frame},
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": EXAMPLES,
                "unexpected_index_column_names": ["ranking_id", "rater_id"],
            },
        )
        self.results = sorted([*self.results, result], key=lambda each: bool(each.success))[:CHUNKS_KEPT]
        levels = {rule.name: rule.level for rule in self._rules}
        for each in result.results:
            check = _row_check(each, levels.get(each.expectation_config.meta["name"], "fail"))
            self._row_checks[check.name] = _join(self._row_checks.get(check.name, check._replace(observed=0.0)), check)

    def checks(self, facts: Facts) -> list[Check]:
        """Every check, the rows' first; what is not known is no failure, and what could not be computed is one."""
        import great_expectations.expectations as gxe

        if self._chunk:
            self._validate_rows()
        on_whole = [rule for rule in self._rules if rule.frame == "whole"]
        known = [rule for rule in on_whole if rule.column not in facts.unknown]
        definition = self._definition(
            "whole",
            [
                gxe.ExpectColumnMaxToBeBetween(
                    column=rule.column, min_value=rule.least, max_value=rule.most, meta={"name": rule.name}
                )
                for rule in known
            ],
        )
        result = definition.run(batch_parameters={"dataframe": pd.DataFrame([facts.whole])}, result_format="SUMMARY")
        for each in result.results:
            if isinstance(each.result.get("observed_value"), np.floating):  # whose repr Great Expectations' pages cannot read
                each.result["observed_value"] = float(each.result["observed_value"])
        self.results.append(result)
        found = {each.expectation_config.meta["name"]: each for each in result.results}
        return [
            *self._row_checks.values(),
            *(
                _whole_check(found[rule.name], rule, facts)
                if rule.column not in facts.unknown
                else Check(rule.name, rule.column, math.nan, _limits(rule), "not known", [], facts.unknown[rule.column])
                for rule in on_whole
            ),
        ]


def gate_of(checks: Sequence[Check]) -> str:
    """ "pass" only if there are checks and none of them failed."""
    return "fail" if not checks or any(check.verdict == "fail" for check in checks) else "pass"


def _raised(result: Any) -> bool:
    information = result.exception_info or {}
    return any(isinstance(each, dict) and each.get("raised_exception") for each in [information, *information.values()])


def _row_check(result: Any, level: str) -> Check:
    configuration = result.expectation_config
    name, column, found = configuration.meta["name"], configuration.kwargs.get("column", "columns"), result.result or {}
    computed = not _raised(result) and isinstance(result.success, bool)
    missing = int(found.get("missing_count") or 0)  # Great Expectations lets missing values pass
    observed = float(found.get("unexpected_count", 0 if result.success else math.nan)) + missing
    passed = computed and result.success and observed == 0
    rows = found.get("partial_unexpected_index_list") or []
    examples = [f"{row['ranking_id']} ({row['rater_id']}): {row.get(column)}" for row in rows]
    verdict = "pass" if passed else level if computed and not missing and math.isfinite(observed) else "fail"
    limits = _limits(Rule(name, "rows", column, configuration.kwargs.get("min_value"), configuration.kwargs.get("max_value")))
    return Check(
        name, column, observed, f"rows that fail: 0 ({column} {limits})", verdict, examples[:EXAMPLES], f"{observed:g} rows"
    )


def _join(before: Check, check: Check) -> Check:
    """The same check of two chunks of rows."""
    verdict = next(each for each in ("fail", "warn", "pass") if each in (before.verdict, check.verdict))
    examples = [*before.examples, *(each for each in check.examples if each not in before.examples)][:EXAMPLES]
    observed = before.observed + check.observed
    return before._replace(observed=observed, verdict=verdict, examples=examples, value=f"{observed:g} rows")


def _whole_check(result: Any, rule: Rule, facts: Facts) -> Check:
    value = (result.result or {}).get("observed_value")
    observed = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    computed = not _raised(result) and math.isfinite(observed)
    verdict = "fail" if not computed else "pass" if result.success is True else rule.level
    estimate = facts.estimates.get(rule.column)
    shown = f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})" if estimate else f"{observed:.4g}"
    examples = facts.examples.get(rule.column, []) if verdict != "pass" else []
    return Check(rule.name, rule.column, observed, _limits(rule), verdict, examples, shown)


def _limits(rule: Rule) -> str:
    least, most = rule.least, rule.most
    of = {"bias": "distance of the interval from 0.5 ", "low": "lower end ", "high": "upper end "}.get(rule.end, "")
    if least is not None and least == most:
        return f"{of}= {least:g}"
    parts = [f">= {least:g}" if least is not None else "", f"<= {most:g}" if most is not None else ""]
    return of + (" and ".join(part for part in parts if part) or "as expected")
