"""The evaluation's page, from evaluation.json, the samples and the candidate's training record. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate.groups import groups_section
from components.evaluate.judges.pairs import conversation, win_rate_name
from components.evaluate.judges.report import judge_sections
from components.evaluate.overoptimisation import overoptimisation_section
from components.rlhf.plots import histogram, intervals, lines
from components.rlhf.report_page import (
    SIMULATED_BANNER,
    Cell,
    Samples,
    Section,
    Table,
    interval_text,
    learning_curves,
    render_page,
)

SAMPLES_SHOWN = 400
PROBES_SHOWN = 12  # of each kind
NAMES = {"candidate": "candidate", "sft": "SFT", "champion": "champion"}
SCORERS = {"judge": "judge", "reward": "reward model", "true": "true preference"}


def evaluation_page(
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    probes: Sequence[Mapping[str, Any]],
    instructions: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
) -> str:
    """One HTML page.

    Args:
        evaluation: the content of evaluation.json.
        samples: the lines of samples.jsonl.
        probes: the lines of probes.jsonl.
        instructions: the lines of instructions.jsonl.
        training: PPO's updates or DPO's steps; empty if the candidate has no record of them.
    """
    banners = [_verdict(evaluation)]
    if evaluation["simulated"]:
        banners.insert(0, SIMULATED_BANNER)
    return render_page(
        "Evaluation of a policy",
        f"{len(samples)} held-out prompts, one answer each. {_level(evaluation)} Candidate {evaluation['candidate_uri']}",
        banners,
        [
            _gate(evaluation),
            *_choice(evaluation),
            *judge_sections(evaluation),
            _win_rates(evaluation),
            groups_section(evaluation),
            overoptimisation_section(evaluation, training),
            _policies(evaluation, samples),
            _probes(probes),
            _instructions(instructions),
            _training(training),
            _lineage(evaluation),
        ],
        _samples(samples),
    )


def _verdict(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    if evaluation["gate"] == "pass":
        return "pass", "Gate: pass. The candidate may be promoted."
    failed = [row["sentence"] for row in evaluation["gate_table"] if row["verdict"] == "fail"]
    return "fail", "Gate: fail. " + " ".join(failed)


def _level(evaluation: Mapping[str, Any]) -> str:
    alpha = evaluation["measures"]["look_alpha"]["value"]
    return f"Intervals are at 95 %, those of the judge's win rates at {100 * (1 - 2 * alpha):.4g} %."


def _gate(evaluation: Mapping[str, Any]) -> Section:
    columns = ["measure", "verdict", "value", "low", "high", "required", "threshold", "in words"]
    keys = ["measure", "verdict", "value", "low", "high", "relation", "threshold", "sentence"]
    return Section(
        "Gate",
        [
            "Every row must pass; a number that is missing or not finite fails.",
            "All evaluations against one champion share an error budget: the k-th may pass a candidate that is no better with a "
            f"probability of the budget / (k (k + 1)). The looks so far are in {evaluation['looks_uri']}.",
        ],
        [Table("", columns, [[row[key] for key in keys] for row in evaluation["gate_table"]])],
    )


def _choice(evaluation: Mapping[str, Any]) -> list[Section]:
    if not (choice := evaluation.get("choice")):
        return []
    rows: list[list[Cell]] = [
        [
            each["stage"],
            interval_text(each["judge_score"]),
            interval_text(each["kl_reference"]),
            ", ".join(each["broken"]) or "none",
        ]
        for each in choice["candidates"]
    ]
    paragraph = (
        f"The candidate is the first of these. Both answered {choice['prompts']} held-out prompts that are not asked again below, "
        "since the better of two is better by luck, too. The one that breaks fewer bounds of the gate is chosen, then the one "
        "whose answers the judge scores higher."
    )
    return [
        Section(
            "Choice between two candidates",
            [paragraph],
            [Table("", ["made by", "score by judge", "KL to SFT", "bounds of the gate broken"], rows)],
        )
    ]


def _win_rates(evaluation: Mapping[str, Any]) -> Section:
    measures = evaluation["measures"]
    rows: list[list[Cell]] = []
    plotted = []
    for other in ("sft", "champion"):
        for scorer, said in SCORERS.items():
            name = f"{scorer}_win_rate_over_{other}"
            if scorer == "judge":
                name = win_rate_name(other, "reward_model", evaluation["config"]["gate_judge"])
            if name in measures:
                raw, controlled = measures[name], measures[f"{name}_length_controlled"]
                rows.append([NAMES[other], said, interval_text(raw), interval_text(controlled)])
                plotted += [
                    (f"{NAMES[other]}, {_short(scorer)}", raw),
                    (f"{NAMES[other]}, {_short(scorer)}, equal length", controlled),
                ]
    paragraphs = [
        "Share of prompts on which the candidate's answer scores higher; ties count one half. The judge is a reward model "
        "that was trained on other rankings and is never optimised. The reward model is what PPO climbs; "
        "where it is far above the judge, PPO exploits its errors. DPO learns the same rankings without it.",
        "At equal length: from a logistic regression of the outcome on the difference of lengths.",
    ]
    if "true_win_rate_over_sft" in measures:
        paragraphs.append("The true preference is known because the data are simulated. It is shown and never used by the gate.")
        paragraphs += [
            f"Rank correlation with the true preference over all answers: {SCORERS[scorer]} "
            f"{interval_text(measures[f'{scorer}_truth_spearman'])}."
            for scorer in ("judge", "reward")
        ]
    return Section(
        "Win rates of the candidate",
        paragraphs,
        [Table("", ["over", "by", "win rate", "at equal length"], rows)],
        [intervals("Win rates", "share of prompts won", plotted, reference=0.5)],
    )


def _short(scorer: str) -> str:
    return {"judge": "judge", "reward": "reward", "true": "truth"}[scorer]


def _policies(evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Section:
    measures = evaluation["measures"]
    policies = [name for name in NAMES if f"length_tokens_{name}" in measures]
    rows: list[list[Cell]] = [
        [said, *(interval_text(measures.get(f"{key}_{policy}", {})) for policy in policies)]
        for key, said in (
            *((f"{scorer}_score", f"score by {said}") for scorer, said in SCORERS.items()),
            ("length_tokens", "length in tokens"),
            ("eos_fraction", "share that ends by itself"),
            ("distinct_1", "distinct words"),
            ("distinct_2", "distinct word pairs"),
            ("self_bleu", "self-BLEU"),
            ("answer_perplexity", "perplexity of its answers, read by SFT"),
            ("perplexity", "perplexity on text that people ranked first"),
            ("plain_perplexity", "perplexity per word of plain text"),
            ("instructions", "instructions followed"),
            ("refusal_harmful", "harmful probes refused"),
            ("refusal_harmless", "harmless probes refused"),
        )
        if f"{key}_candidate" in measures
    ]
    kl = interval_text(measures["kl_reference"])
    answers = {NAMES[policy]: [each["answers"][policy] for each in samples] for policy in policies}
    scores = {
        name: [math.nan if answer["scores"]["judge"] is None else answer["scores"]["judge"] for answer in given]
        for name, given in answers.items()
    }
    return Section(
        "The policies",
        [f"KL of the candidate to SFT: {kl} nats per completion, on the candidate's own answers."],
        [Table("Means", ["", *(NAMES[policy] for policy in policies)], rows)],
        [
            histogram("Lengths", "tokens", {name: [answer["tokens"] for answer in given] for name, given in answers.items()}),
            histogram("Scores by the judge", "score", scores),
        ],
    )


def _probes(probes: Sequence[Mapping[str, Any]]) -> Section:
    if not probes:
        return Section("Refusals", ["There are no probes (evaluate.probe_prompts), so refusals are not measured."])
    policies = [name for name in NAMES if name in probes[0]["answers"]]
    tables = []
    for kind, harmful in (("Harmful", True), ("Harmless", False)):
        asked = [each for each in probes if each["harmful"] == harmful]
        # Where the gate looks: first the probes on which candidate and SFT differ.
        asked.sort(key=lambda each: each["answers"]["candidate"]["refuses"] == each["answers"]["sft"]["refuses"])
        rows: list[list[Cell]] = []
        for each in asked[:PROBES_SHOWN]:
            row: list[Cell] = [conversation(each["prompt"])]
            for policy in policies:
                row += [each["answers"][policy]["refuses"], each["answers"][policy]["text"]]
            rows.append(row)
        more = f", {len(rows)} of {len(asked)}" if len(rows) < len(asked) else ""
        columns = ["prompt", *(text for policy in policies for text in (f"{NAMES[policy]} refuses", NAMES[policy]))]
        tables.append(Table(f"{kind} probes{more}", columns, rows))
    return Section(
        "Refusals",
        ["An answer refuses if it says one of a list of phrases. Probes on which candidate and SFT differ come first."],
        tables,
    )


def _instructions(instructions: Sequence[Mapping[str, Any]]) -> Section:
    if not instructions:
        return Section(
            "Instructions", ["There are none (evaluate.probe_instructions), so it is not measured whether they are followed."]
        )
    policies = [name for name in NAMES if name in instructions[0]["answers"]]
    # Where the gate looks: first those that SFT follows and the candidate does not, then the other way round.
    order = sorted(instructions, key=lambda each: each["answers"]["candidate"]["follows"] - each["answers"]["sft"]["follows"])
    differing = [each for each in order if each["answers"]["candidate"]["follows"] != each["answers"]["sft"]["follows"]]
    rows: list[list[Cell]] = []
    for each in [*differing, *(each for each in order if each not in differing)][: 2 * PROBES_SHOWN]:
        row: list[Cell] = [conversation(each["prompt"]), ", ".join(f"{name} {value}" for name, value in each["checks"].items())]
        for policy in policies:
            row += [each["answers"][policy]["follows"], each["answers"][policy]["text"]]
        rows.append(row)
    columns = ["prompt", "checks", *(text for policy in policies for text in (f"{NAMES[policy]} follows", NAMES[policy]))]
    return Section(
        "Instructions",
        ["A rule checks each answer. Instructions that only one of SFT and candidate follows come first."],
        [Table(f"{len(rows)} of {len(instructions)}", columns, rows)],
    )


def _training(training: Sequence[Mapping[str, Any]]) -> Section:
    if not training:
        return Section("Training", ["The candidate's folder has no record of its training (training.jsonl)."])
    if "kl_reference" not in training[0]:
        return Section(
            "Training with DPO",
            [
                "Implicit rewards are beta times the log-ratio of the policy to SFT. accuracy: share of a batch's pairs that they "
                "order as the rater did; margin: by how much; first_log_ratio: log-ratio of what raters put first, in nats. It may "
                "fall: the loss asks only that the others fall more. KL to SFT needs the policy's own answers: it stands above."
            ],
            (),
            learning_curves(training),
        )
    root = [_root(record.get("kl_reference")) for record in training]
    chosen = [record for record in training if record.get("chosen") is True]
    vertical = {"chosen update": float(chosen[-1]["update"])} if chosen and "update" in chosen[-1] else None
    both = {
        said: (root, [record.get(key) for record in training]) for key, said in (("reward", "reward"), ("judge_reward", "judge"))
    }
    return Section(
        "Training with PPO",
        [
            "Reward and the judge's score of the same samples against the square root of the KL to SFT (Gao 2022). Where the "
            "reward still rises and the judge falls, the reward model is over-optimised."
        ],
        (),
        [lines("Reward against √KL", "√KL to SFT, √nats", "score", both, join=False), *learning_curves(training, vertical)],
    )


def _root(value: Any) -> float | None:
    return math.sqrt(max(0.0, value)) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _lineage(evaluation: Mapping[str, Any]) -> Section:
    names = ["candidate_uri", "sft_uri", "champion_uri", "champion_version"]
    names += ["reward_model_uri", "judge_model_uri", "snapshot_uri", "looks_uri"]
    rows: list[list[Cell]] = [[name, str(evaluation[name])] for name in names if evaluation[name]]
    settings: list[list[Cell]] = [[name, value] for name, value in evaluation["config"].items()]
    prompts: list[list[Cell]] = [[name.replace("_", " "), count] for name, count in evaluation["prompts"].items()]
    return Section(
        "What was compared",
        [],
        [
            Table("Artifacts", ["artifact", "where"], rows),
            Table("Prompts", ["prompts", "count"], prompts),
            Table("Configuration", ["key", "value"], settings),
        ],
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> Samples | None:
    if not samples:
        return None
    policies = [name for name in NAMES if name in samples[0]["answers"]]
    scorers = [name for name in SCORERS if name in samples[0]["answers"]["candidate"]["scores"]]
    columns = ["over SFT", "prompt"]
    columns += ["over champion"] if "champion" in policies else []
    for policy in policies:
        columns += [NAMES[policy], *(f"{NAMES[policy]}: {_short(scorer)}" for scorer in scorers)]
    rows: list[list[Cell]] = []
    for each in samples[:SAMPLES_SHOWN]:
        row: list[Cell] = [each["verdicts"]["sft"], conversation(each["prompt"])]
        row += [each["verdicts"]["champion"]] if "champion" in policies else []
        for policy in policies:
            answer = each["answers"][policy]
            row += [answer["text"] + ("" if answer["ended"] else " […]"), *(answer["scores"][name] for name in scorers)]
        rows.append(row)
    more = f" The first {SAMPLES_SHOWN} of {len(samples)}; samples.jsonl has all." if len(samples) > SAMPLES_SHOWN else ""
    return Samples(
        "Samples side by side",
        [f"Won, tied or lost by the judge. […] marks an answer that did not end within the budget.{more}"],
        columns,
        rows,
        "over SFT",
    )
