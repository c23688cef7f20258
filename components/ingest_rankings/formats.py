"""A row of any supported form as rankings.

    rankloop  the record itself: `prompt`, `completions`, `ranks`, and any other field of `Ranking`
    kway      the same with `scores` (higher is better), or with objects `{text, score | rank, policy?}` as completions
    hh        `chosen` and `rejected` as "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts (Bai et al. 2022, arXiv:2204.05862)
    pairs     `prompt`, `chosen`, `rejected` as texts or message lists; or whole conversations that share all but the last turn

Rows of labelling tools and of public datasets are turned into rows of the second form first (`exports`).
Nothing is repaired: what is not a ranking is `Rejected` with the value that is wrong.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from components.ingest_rankings.exports import EXPORTS
from components.ingest_rankings.exports.export import Export
from components.ingest_rankings.fields import (
    check_completions,
    check_prompt,
    check_ranks,
    confidence_of,
    optional_text,
    policies_of,
    utc_time,
)
from components.ingest_rankings.raters import EVERYBODY_KEPT, Raters
from components.ingest_rankings.rows import Rejected, shown
from components.rlhf.records import ROLES, UNKNOWN_RATER, Message, Ranking, Split

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")
_TURN_FIELDS = frozenset({"role", "content"})
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_DETAILS = ("ranking_id", "rater_id", "source", "collected_at", "confidence", "policies", "criterion", "split")
FIELDS: dict[str, frozenset[str]] = {
    "rankloop": frozenset({*_DETAILS, "prompt", "completions", "ranks"}),
    "kway": frozenset({*_DETAILS, "prompt", "completions", "ranks", "scores"}),
    "hh": frozenset({*_DETAILS, "chosen", "rejected"}),
    "pairs": frozenset({*_DETAILS, "prompt", "chosen", "rejected"}),
}
COMPLETION_FIELDS = ("text", "rank", "score", "policy")
FORMS = ("auto", *FIELDS, *EXPORTS)
COLUMNS = "columns"  # the form of a row that a column map reads


class Parsed(NamedTuple):
    """One ranking of a row.

    Fields:
        form: the one that the row had; `COLUMNS` if a column map read it.
        ignored: fields of the row that this form does not know.
        split_given: whether the split is the row's own.
    """

    ranking: Ranking
    form: str
    ignored: list[str]
    split_given: bool


def parse(
    row: dict[str, Any],
    form: str,
    source: str,
    test_fraction: float,
    columns: Export | None = None,
    raters: Raters = EVERYBODY_KEPT,
) -> Iterator[Parsed | Rejected]:
    """The rankings of a row: one, unless it is an export's with the judgements of several raters. What is none is `Rejected`.

    Args:
        row: field name to value; None is the same as missing.
        form: how to read it, one of `FORMS`; "auto" recognises each row by its own fields, so that the order of rows changes
            nothing.
        source: the ranking's source where the row names none.
        test_fraction: share of the openings whose rankings are held out, where the row names no split.
        columns: a column map, by which the row is read whatever its form.
        raters: what they are called.
    """
    try:
        name = COLUMNS if columns else recognise(row) if form == "auto" else form
        if (export := columns or EXPORTS.get(name)) is None:
            yield _parse(row, name, source, test_fraction, raters)
            return
        if columns is None and not export.recognises(row):
            raise Rejected(f"not a row of {name}", f"fields {shown(sorted(map(str, row)))}")
        ignored = _ignored(row, export.fields) if export.fields is not None else []
        found = False
        for native in export.rankings(row):
            found = True
            if isinstance(native, Rejected):
                yield native
                continue
            try:
                form = "pairs" if native.get("chosen") is not None else "kway"
                yield _parse(native, form, source, test_fraction, raters)._replace(form=name, ignored=ignored)
            except Rejected as problem:
                yield problem
        if not found:  # each row is counted
            yield Rejected("no ranking in the row", name)
    except Rejected as problem:
        yield problem


def _parse(row: dict[str, Any], form: str, source: str, test_fraction: float, raters: Raters) -> Parsed:
    """The ranking of a row of a native form.

    Raises:
        Rejected: the row is not a ranking.
    """
    try:
        return _checked(row, form, source, test_fraction, raters)
    except (UnicodeEncodeError, orjson.JSONEncodeError) as error:
        raise Rejected("a text is not valid Unicode", str(error)) from error


def _checked(row: dict[str, Any], form: str, source: str, test_fraction: float, raters: Raters) -> Parsed:
    if form in ("hh", "pairs"):
        prompt, completions = _pair(row, form)
        ranks, policies = [1, 2], row.get("policies")
    else:
        prompt = _prompt(_needed(row, "prompt"))
        completions, ranks, policies = _ranked(row, form)
    check_prompt(prompt)
    check_completions(completions)
    check_ranks(ranks, len(completions))
    rater_id = optional_text(row, "rater_id") or UNKNOWN_RATER
    content: dict[str, Any] = {
        "prompt": prompt,
        "completions": completions,
        "ranks": ranks,
        "rater_id": raters.named(rater_id),
        "source": optional_text(row, "source") or source,
        "collected_at": utc_time(row.get("collected_at")),
        "confidence": confidence_of(row.get("confidence")),
        "policies": policies_of(policies, len(completions)),
        "criterion": optional_text(row, "criterion"),
    }
    given = optional_text(row, "ranking_id")
    ranking_id = raters.in_ranking_id(given, rater_id) if given else _digest(content)
    ranking = Ranking(ranking_id=ranking_id, split=_split(row.get("split"), prompt, test_fraction), **content)
    ignored = _ignored(row, FIELDS[form]) + (_ignored_of_completions(row) if form == "kway" else [])
    return Parsed(ranking, form, ignored, row.get("split") is not None)


def content_digest(ranking: Ranking) -> str:
    """What `ranking_id` is where the row names none: the SHA-256 of all but the id itself and the split."""
    return _digest({name: value for name, value in ranking._asdict().items() if name not in ("ranking_id", "split")})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def _ignored(row: dict[str, Any], known: frozenset[str]) -> list[str]:
    if row.keys() <= known:
        return []
    return sorted(str(key) for key, value in row.items() if key not in known and value is not None)


def _ignored_of_completions(row: dict[str, Any]) -> list[str]:
    names: set[str] = set()
    for completion in row.get("completions") or []:
        if isinstance(completion, dict):
            names |= {f"completions[].{key}" for key in completion if key not in COMPLETION_FIELDS}
    return sorted(names)


def canonical(content: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no white space: equal contents have equal bytes."""
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def recognise(row: dict[str, Any]) -> str:
    """The form of a row by its fields and their types.

    Raises:
        Rejected: it has none.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        texts = [row["chosen"], row["rejected"]]
        transcripts = all(isinstance(text, str) for text in texts) and any(_TRANSCRIPT.match(text) for text in texts)
        return "hh" if transcripts and row.get("prompt") is None else "pairs"
    plain = isinstance(row.get("completions"), list) and set(map(type, row["completions"])) <= {str}
    if plain and row.get("ranks") is not None:
        return "rankloop" if row.get("scores") is None else "kway"
    for name, export in EXPORTS.items():
        if export.recognises(row):
            return name
    given = {key for key, value in row.items() if value is not None}
    if "completions" in given:
        return "rankloop" if plain and "scores" not in given else "kway"
    raise Rejected(
        "unknown form",
        f"fields {shown(sorted(str(key) for key in given))}; expected completions, or chosen and rejected, or an export's",
    )


def opening(prompt: Sequence[Message]) -> str:
    """The first thing that the user says; what the split goes by."""
    return next(message["content"].strip() for message in prompt if message["role"] == "user")


def _split(value: Any, prompt: list[Message], test_fraction: float) -> Split:
    if value is None:
        return split_of(opening(prompt), test_fraction)
    if value not in ("train", "test"):
        raise Rejected("split is neither train nor test", shown(value))
    return "train" if value == "train" else "test"


def split_of(said: str, test_fraction: float) -> Split:
    """The side of a conversation that the user opens with this text, by its hash."""
    number = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big")
    return "test" if number < test_fraction * 2**64 else "train"


# -- prompts and conversations -------------------------------------------------------------------------------------------


def _needed(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise Rejected(f"no {name}", f"fields {shown(sorted(map(str, row)))}")
    return row[name]


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise Rejected(f"{name} is neither a text nor a list of messages", shown(value))
    result: list[Message] = []
    for each in value:
        if isinstance(each, dict) and each.keys() == _TURN_FIELDS and isinstance(each["content"], str) and each["role"] in ROLES:
            result.append({"role": each["role"], "content": each["content"]})
            continue
        given = {key for key, item in each.items() if item is not None} if isinstance(each, dict) else set()
        if given != {"role", "content"} or not isinstance(each["content"], str) or each["role"] not in ROLES:
            raise Rejected(f"a message of {name} is not a role ({', '.join(ROLES)}) with a text as content", shown(each))
        result.append({"role": each["role"], "content": each["content"]})
    return result


def _transcript(text: str, name: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; the white space around a turn belongs to the form, not to the turn."""
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts or parts[0] != "Human":
        raise Rejected(f"{name} is not a transcript that begins with a Human turn", shown(text))
    return [{"role": _SPEAKERS[speaker], "content": turn.strip()} for speaker, turn in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(value: Any) -> list[Message]:
    """A text is what the user says, unless it is a transcript up to an empty Assistant turn."""
    if not isinstance(value, str):
        return _messages(value, "prompt")
    if not _TRANSCRIPT.match(value) or not value.startswith("\n\n"):
        return [{"role": "user", "content": value}]
    turns = _transcript(value, "prompt")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _conversation(value: Any, name: str, form: str) -> list[Message]:
    if isinstance(value, str):
        if form == "hh" or (value.startswith("\n\n") and _TRANSCRIPT.match(value)):
            return _transcript(value, name)
        return [{"role": "assistant", "content": value}]
    if form == "hh":
        raise Rejected(f"{name} is not a transcript that begins with a Human turn", shown(value))
    return _messages(value, name)


def _pair(row: dict[str, Any], form: str) -> tuple[list[Message], list[str]]:
    """Prompt, and the chosen before the rejected completion. Both conversations may differ in the last turn only."""
    chosen = _conversation(_needed(row, "chosen"), "chosen", form)
    rejected = _conversation(_needed(row, "rejected"), "rejected", form)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1]["role"] != "assistant":
            raise Rejected("conversation does not end with the assistant", f"last turn of {name}: {shown(turns[-1:])}")
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        turn = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        detail = f"turn {turn + 1}: {shown(chosen[turn]['content'])} and {shown(rejected[turn]['content'])}"
        raise Rejected("conversations differ before the last turn", f"{detail}; {len(chosen)} and {len(rejected)} turns")
    shared, completions = chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]]
    given = row.get("prompt") if form == "pairs" else None
    if given is None:
        if not shared:
            raise Rejected("no prompt", "neither a field prompt nor shared turns")
        return shared, completions
    prompt = _prompt(given)
    said = shared if prompt[:1] and prompt[0]["role"] == "system" else [m for m in shared if m["role"] != "system"]
    if shared and said[: len(prompt)] != prompt:
        raise Rejected("chosen does not continue the prompt", f"{shown(prompt)} and {shown(shared)}")
    return shared or prompt, completions


# -- completions and their order -----------------------------------------------------------------------------------------


def _ranked(row: dict[str, Any], form: str) -> tuple[list[str], list[int], Any]:
    """Completions, ranks and policies of a K-way row. Scores become competition ranks: 9, 7, 7, 1 is 1, 2, 2, 4."""
    completions, policies = _needed(row, "completions"), row.get("policies")
    if not isinstance(completions, list):
        raise Rejected("completions are not a list", shown(completions))
    ranks, scores = row.get("ranks"), row.get("scores") if form == "kway" else None
    if form == "kway" and completions and all(isinstance(each, dict) for each in completions):
        columns = {name: [each.get(name) for each in completions] for name in COMPLETION_FIELDS}
        for name, outer in (("rank", ranks), ("score", scores), ("policy", policies)):
            if outer is not None and any(item is not None for item in columns[name]):
                raise Rejected(f"{name} given twice", "in the row and in its completions")
        completions = columns["text"]
        ranks = columns["rank"] if any(item is not None for item in columns["rank"]) else ranks
        scores = columns["score"] if any(item is not None for item in columns["score"]) else scores
        policies = columns["policy"] if any(item is not None for item in columns["policy"]) else policies
    numbers = None if ranks is None else _whole_numbers(ranks)
    if scores is None:
        if numbers is None:
            raise Rejected("no ranks" if form == "rankloop" else "neither ranks nor scores", f"{len(completions)} completions")
        return completions, numbers, policies
    by_score = _ranks_of_scores(scores)
    if numbers is None:
        return completions, by_score, policies
    if dense(numbers) != dense(by_score):
        raise Rejected("ranks and scores disagree", f"{shown(numbers)} and {shown(scores)}")
    return completions, numbers, policies


def _whole_numbers(ranks: Any) -> list[int]:
    """Ranks as integers; 2.0 is one, as tables with a missing value store it; True, "2" and 1.5 are not."""
    if not isinstance(ranks, list):
        raise Rejected("ranks are not a list", shown(ranks))
    if set(map(type, ranks)) == {int}:
        return ranks
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or (isinstance(rank, float) and not rank.is_integer()):
            raise Rejected("a rank is not an integer", shown(rank))
    return [int(rank) for rank in ranks]


def _ranks_of_scores(scores: Any) -> list[int]:
    if not isinstance(scores, list):
        raise Rejected("scores are not a list", shown(scores))
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < math.inf:
            raise Rejected("a score is not a finite number", shown(score))
    ordered = sorted(scores, reverse=True)
    first = {score: place + 1 for place, score in reversed(list(enumerate(ordered)))}
    return [first[score] for score in scores]


def dense(ranks: Sequence[int]) -> list[int]:
    """The same order, ranks without gaps: 1, 1, 3 is 1, 1, 2."""
    distinct = set(ranks)
    if len(distinct) == max(ranks, default=0) and min(ranks, default=1) == 1:
        return list(ranks)
    places = {rank: place for place, rank in enumerate(sorted(distinct), 1)}
    return [places[rank] for rank in ranks]
