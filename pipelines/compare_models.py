"""Two versions side by side: the same prompts, both answers, and how often one wins by the judge."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.register_model.lineage import Version, pick, read_versions
from components.register_model.promotion import Registry
from components.services.exits import DoNotRetry
from components.services.json_lines import read_json_lines
from components.services.storage import MARKER, join
from pipelines.display import estimate

if TYPE_CHECKING:
    from components.evaluate.measures import Answer
    from components.evaluate.stage import Config
    from components.rlhf.records import Message

RESAMPLES = 2000


def compare_versions(
    console: Console,
    registry: Registry,
    wanted: tuple[str, str],
    prompts_from: str,
    count: int,
    judge: str,
    shown: int,
    output: Path | None,
    seed: int,
) -> None:
    """Prints the win rate of the first version over the second and some prompts with both answers; `output` gets all of them."""
    from transformers.utils import logging

    from components.evaluate.answers import Sampling, draw, score_all
    from components.evaluate.stage import Inputs
    from components.services.launch import Context

    logging.disable_progress_bar()
    versions = read_versions(registry.client, registry.policy)
    a, b = (pick(versions, registry.policy, each) for each in wanted)
    judge = judge or a.tags.get("judge_model_uri", "")
    if not judge:
        raise DoNotRetry(f"version {a.number} does not say which judge it was evaluated with", "name one: --judge s3://…")
    config = evaluated_with(registry, a)
    with tempfile.TemporaryDirectory(prefix="rankloop-compare-") as folder:
        inputs = Inputs(
            snapshot_uri=a.tags.get("snapshot_uri", ""),
            candidate_uri=_policy(a),
            sft_uri="",
            reward_model_uri="",
            judge_model_uri=judge,
        )
        context = Context("evaluate", config, inputs, Path(folder))
        prompts = _prompts(registry, a, prompts_from, count, seed, Path(folder))
        sampling = Sampling(
            config.max_new_tokens, config.max_prompt_tokens, config.temperature, config.batch_size, seed, config.precision
        )
        drawn = draw(context, {"candidate": _policy(a), "other": _policy(b)}, prompts, sampling)
        answers = score_all(context, {"judge": judge}, prompts, drawn, sampling)
    asked = [prompts[i] for i in drawn.completions["candidate"]]
    records = [
        record(prompt, ours, theirs) for prompt, ours, theirs in zip(asked, answers["candidate"], answers["other"], strict=True)
    ]
    both = (answers["candidate"], answers["other"])
    console.print(summary(registry.policy, a, b, both, len(prompts), judge, seed), highlight=False)
    if shown:
        console.print(_answers(records[:shown], a, b), highlight=False)
    if output is not None:
        output.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
        console.print(f"wrote {len(records)} lines to {output}", highlight=False, markup=False)


def evaluated_with(registry: Registry, version: Version) -> Config:
    """The configuration of a version's evaluation, so that it is asked as it was then; the defaults if that is not known."""
    from components.evaluate.stage import Config
    from components.services.launch import parse_settings

    uri = version.tags.get("evaluation_uri", "")
    known = uri and registry.storage.is_published(uri)
    return parse_settings(Config, registry.storage.get_json(join(uri, MARKER))["config"] if known else {}, "evaluate")


def _policy(version: Version) -> str:
    if uri := version.tags.get("policy_uri", ""):
        return uri
    raise DoNotRetry(f"version {version.number} does not say where its policy is (tag policy_uri)", "compare another version")


def _prompts(registry: Registry, version: Version, source: str, count: int, seed: int, folder: Path) -> list[list[Message]]:
    from components.evaluate.answers import choose_prompts
    from components.rlhf.records import iterate_snapshot, messages_of

    if source:
        rows = read_json_lines(
            source, registry.storage, lambda row: messages_of(row["prompt"]), what="prompt", form='{"prompt": text or messages}'
        )
        return rows[:count]
    snapshot = version.tags.get("snapshot_uri", "")
    if not snapshot:
        raise DoNotRetry(f"version {version.number} does not say which data it learned from", "give prompts: --prompts FILE")
    registry.storage.fetch_folder(snapshot, folder / "snapshot")
    prompts, _ = choose_prompts(iterate_snapshot(folder / "snapshot", "test"), count, seed)
    if not prompts:
        raise DoNotRetry(f"{snapshot} has no rankings in the test split", "give prompts: --prompts FILE")
    return prompts


def record(prompt: Sequence[Message], ours: Answer, theirs: Answer) -> dict[str, Any]:
    """One line of the output: the prompt, both answers with their scores, and who won."""
    from components.evaluate.measures import outcome

    verdict = {1.0: "A", 0.0: "B", 0.5: "tie"}.get(outcome(ours, theirs, "judge"), "unknown")
    sides = {
        side: {
            "text": each.text,
            "tokens": each.tokens,
            "ended": each.ended,
            "score": each.scores["judge"] if math.isfinite(each.scores["judge"]) else None,
        }
        for side, each in (("A", ours), ("B", theirs))
    }
    return {"prompt": list(prompt), **sides, "won_by": verdict}


def summary(
    name: str, a: Version, b: Version, answers: tuple[Sequence[Answer], Sequence[Answer]], asked: int, judge: str, seed: int
) -> Table:
    """Win rate of A over B with its interval, raw and at equal length, and what stands behind it."""
    from components.evaluate.measures import outcome
    from components.rlhf.statistics import as_json, length_controlled_win_rate, win_rate

    ours, theirs = answers
    wins = [outcome(mine, other, "judge") for mine, other in zip(ours, theirs, strict=True)]
    longer = [mine.tokens - other.tokens for mine, other in zip(ours, theirs, strict=True)]
    known = all(math.isfinite(each) for each in wins)
    rates = (win_rate(wins, seed, RESAMPLES), length_controlled_win_rate(wins, longer, seed, RESAMPLES)) if known else ()
    raw, controlled = (estimate(as_json(each)) for each in rates) if known else ("unknown", "unknown")
    table = Table(title=f"A against B of {name}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in (
        ("A", _title(a)),
        ("B", _title(b)),
        ("prompts", f"{len(wins)} answered of {asked}"),
        ("A wins", f"{raw} of them, ties count one half"),
        ("at equal length", controlled),
        ("won, tied, lost", f"{wins.count(1.0)}, {wins.count(0.5)}, {wins.count(0.0)}"),
        ("mean tokens", f"{_mean([each.tokens for each in ours]):.1f} and {_mean([each.tokens for each in theirs]):.1f}"),
        ("judge", judge + ("" if judge == b.tags.get("judge_model_uri") else "  (B was evaluated with another)")),
    ):
        table.add_row(key, Text(value))
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _title(version: Version) -> str:
    carried = f" ({', '.join(version.aliases)})" if version.aliases else ""
    return f"version {version.number}{carried}: {version.tags.get('policy_uri', '')}"


def _answers(records: Sequence[Mapping[str, Any]], a: Version, b: Version) -> Table:
    table = Table(title=f"{len(records)} prompts", title_justify="left", show_lines=True)
    for column in ("prompt", f"A: version {a.number}", f"B: version {b.number}", "won by"):
        table.add_column(column, overflow="fold")
    for each in records:
        scores = ("–" if each[side]["score"] is None else f"{each[side]['score']:.2f}" for side in "AB")
        texts = [f"{each[side]['text']}\n[{score}]" for side, score in zip("AB", scores, strict=True)]
        table.add_row(Text(each["prompt"][-1]["content"]), *(Text(text) for text in texts), each["won_by"])
    return table
