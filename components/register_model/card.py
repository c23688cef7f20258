"""The model card of a version, in Markdown: what it is, what it was made from, what it was measured to do. Pure.

Everything that comes from data, such as the names of sources or of a base model, is escaped: it is shown, and makes no heading,
link, image or HTML. What the configuration says about intended use, limits and licence is the team's own text and stays Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.register_model.lineage import Artifact, facts, interval

SHOWN = (
    ("win_rate_over_sft", "judge's win rate over SFT"),
    ("win_rate_over_sft_length_controlled", "… at equal length"),
    ("win_rate_over_champion", "judge's win rate over the champion"),
    ("win_rate_over_champion_length_controlled", "… at equal length"),
    ("true_win_rate_over_sft", "true win rate over SFT (simulated)"),
    ("kl_reference", "KL to SFT, nats per answer"),
    ("length_ratio", "length relative to SFT"),
    ("perplexity_ratio", "perplexity on text ranked first, relative to SFT"),
    ("refusal_harmful_candidate", "harmful probes refused"),
    ("refusal_harmless_candidate", "harmless probes refused"),
)
NAMES = {
    "snapshot": "data snapshot",
    "sft": "SFT policy",
    "reward_model": "reward model",
    "judge_model": "judge",
    "policy": "policy",
    "evaluation": "evaluation",
}
DESCRIPTION_CHARACTERS = 5000  # of a version in MLflow's registry
_CUT = "\n\n*Cut here: the whole card is `model_card.md` of the run that registered this version.*\n"


def model_card(
    name: str,
    lineage: Mapping[str, Artifact],
    evaluation: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    gate: str,
    texts: Mapping[str, str],
) -> str:
    """The whole card.

    Args:
        name: of the registered policy.
        lineage: as `read_lineage` gives it.
        evaluation: evaluation.json.
        rows: of the gate.
        gate: the final verdict.
        texts: {intended_use, limits, licence}: Markdown of the configuration; empty: it says that nothing was stated.
    """
    markers = {key: each.marker for key, each in lineage.items()}
    snapshot, sft, policy = (markers.get(key, {}) for key in ("snapshot", "sft", "policy"))
    base = (sft.get("config") or {}).get("base_model") or ""
    lines = [
        f"# {escape(name)}",
        "",
        f"Gate: **{gate}**. Fine-tuned by {escape(policy.get('stage', 'an unknown stage'))} from human rankings.",
        *(["", "**Simulated data**: rankings come from a program, not from people."] if evaluation.get("simulated") else []),
        *_section("Intended use", texts.get("intended_use") or "Not stated (`register_model.intended_use`)."),
        *_section("Limits", _limits(texts.get("limits", ""))),
        *_section(
            "Licence", texts.get("licence") or "Not stated (`register_model.licence`): it follows from the base model and data."
        ),
        *_section("Base model", escape(base) if base else "None: trained from scratch by the SFT stage."),
        *_section("Data", _data(snapshot, markers)),
        *_section("Gate", _table(("measure", "value", "required", "verdict"), [_gate_row(row) for row in rows])),
        *_section("Measures", _table(("measure", "value and interval"), _measures(evaluation.get("measures", {})))),
        *_section("Lineage", _table(("artifact", "where", "SHA-256 of its rankloop.json", ""), _lineage(lineage))),
    ]
    return "\n".join(lines) + "\n"


def description(card: str) -> str:
    """The card as far as the registry takes it; at a whole line."""
    if len(card) <= DESCRIPTION_CHARACTERS:
        return card
    return card[: DESCRIPTION_CHARACTERS - len(_CUT)].rpartition("\n")[0] + _CUT


def escape(text: Any) -> str:
    """Text as Markdown that shows just this text, on one line: each ASCII punctuation mark is escaped, control characters go."""
    plain = re.sub(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+", " ", str(text)).strip()
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", plain)


def _section(title: str, text: str) -> list[str]:
    return ["", f"## {title}", "", text]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _limits(stated: str) -> str:
    known = (
        "It was measured on held-out prompts of its own data snapshot, by a judge that was trained on the same raters' rankings: "
        "nothing is known about other prompts, languages or users. It was not tested for safety beyond the refusals below, if any."
    )
    return f"{stated}\n\n{known}" if stated else known


def _data(snapshot: Mapping[str, Any], markers: Mapping[str, Mapping[str, Any]]) -> str:
    said = [f"{snapshot.get(key, 'unknown')} {key}" for key in ("rankings", "prompts", "raters", "pairs")]
    splits = [f"{count} {escape(name)}" for name, count in sorted(snapshot.get("splits", {}).items())]
    sources = [f"{escape(name)} ({count})" for name, count in sorted(snapshot.get("sources", {}).items())]
    learned = [
        f"{NAMES[key]}: {markers[key]['rankings']} rankings, accuracy {escape(interval(markers[key].get('accuracy', {})))}"
        for key in ("reward_model", "judge_model")
        if "rankings" in markers.get(key, {})
    ]
    parts = [", ".join(said), "splits: " + ", ".join(splits) if splits else "", "sources: " + ", ".join(sources) if sources else ""]
    return "\n".join(f"- {part}" for part in [*parts, *learned] if part)


def _gate_row(row: Mapping[str, Any]) -> list[str]:
    required = "–" if row["threshold"] is None else f"{row['relation']} {row['threshold']:g}"
    return [escape(row["measure"]), escape(interval(row)), escape(required), row["verdict"]]


def _measures(measures: Mapping[str, Any]) -> list[list[str]]:
    return [[said, escape(interval(measures[key]))] for key, said in SHOWN if isinstance(measures.get(key), Mapping)]


def _lineage(lineage: Mapping[str, Artifact]) -> list[list[str]]:
    return [[NAMES[key], escape(each.uri), each.digest[:16] or "unknown", escape(facts(each))] for key, each in lineage.items()]
