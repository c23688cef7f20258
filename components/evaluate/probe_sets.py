"""The probes of an evaluation: prompts that should or should not be refused, instructions, and plain text.

Those that are shipped are English sentences of our own (`probes/`), in the manner of XSTest (Röttger 2023, arXiv 2308.01263: each
harmful request beside one that only sounds like it) and IFEval. They mean nothing to a model of the simulated world, which has
probes of its own grammar for refusals, and none for instructions and plain text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from components.evaluate.instructions import Instruction, instruction_of
from components.evaluate.measures import Measures, Reading
from components.evaluate.refusals import Probe, read_probes, simulated_probes
from components.rlhf.statistics import Estimate, as_json, paired_difference, perplexity, perplexity_ratio, wilson_interval
from components.services.json_lines import read_json_lines
from components.services.storage import Storage

SHIPPED, NONE = "shipped", "none"
FOLDER = Path(__file__).parent / "probes"


class Probes(NamedTuple):
    """What every policy is asked, and what it reads; an empty list is not measured and not required."""

    refusals: list[Probe]
    instructions: list[Instruction]
    texts: list[str]


def find_probes(refusals: str, instructions: str, texts: str, simulated: bool, seed: int, storage: Storage) -> Probes:
    """Each as configured: "shipped", "none", or a file or s3:// object.

    Args:
        simulated: whether the rankings are the simulated world's, whose own probes then stand for those that are shipped.
        seed: of the simulated world's probes.

    Raises:
        DoNotRetry: a file is missing or a line in it is no probe.
    """
    own = {name for name, given in (("refusals", refusals), ("instructions", instructions), ("texts", texts)) if given == SHIPPED}
    own = own if simulated else set()
    asked, told, plain = simulated_probes(seed) if "refusals" in own else [], list[Instruction](), list[str]()
    if refusals != NONE and "refusals" not in own:
        asked = read_probes(_place(refusals, "refusals"), storage)
    if instructions != NONE and "instructions" not in own:
        form = '{"prompt": text or messages, "checks": {check: argument}}'
        told = read_json_lines(_place(instructions, "instructions"), storage, instruction_of, what="checked instruction", form=form)
    if texts != NONE and "texts" not in own:
        plain = read_json_lines(_place(texts, "texts"), storage, _text, what="text", form='{"text": text}')
    return Probes(asked, told, plain)


def _place(configured: str, name: str) -> str:
    return str(FOLDER / f"{name}.jsonl") if configured == SHIPPED else configured


def _text(row: Any) -> str:
    if not isinstance(row, dict) or set(row) != {"text"} or not isinstance(row["text"], str) or len(row["text"].split()) < 2:
        raise ValueError("expected an object with the key text, of two words at least")
    text: str = row["text"]
    return text


def measure_instructions(records: list[dict[str, Any]]) -> Measures:
    """Share of instructions that each policy follows, and by how much the candidate's is below SFT's and the champion's.

    Args:
        records: as `instruction_records` gives them; of none, nothing is measured.
    """
    found: dict[str, Estimate] = {}
    policies = list(records[0]["answers"]) if records else []
    kept = {policy: [each["answers"][policy]["follows"] for each in records] for policy in policies}
    for policy, each in kept.items():
        found[f"instructions_{policy}"] = wilson_interval(sum(each), len(each))
        if policy != "candidate":
            found[f"instruction_drop_{policy}"] = paired_difference(each, kept["candidate"])
    return {name: as_json(estimate) for name, estimate in found.items()}


def measure_plain_text(read: dict[str, list[Reading]], seed: int, resamples: int) -> Measures:
    """Perplexity per word of plain text under each policy, and the candidate's relative to SFT's and the champion's.

    Args:
        read: {policy: each text as it reads it, with the number of its words}; of none, nothing is measured.
        seed, resamples: of the bootstrap over texts.
    """
    columns = {policy: ([each.nats for each in given], [each.tokens for each in given]) for policy, given in read.items()}
    found: dict[str, Estimate] = {}
    for policy, each in columns.items():
        found[f"plain_perplexity_{policy}"] = perplexity(*each, seed, resamples)
        if policy != "candidate":
            found[f"plain_perplexity_ratio_{policy}"] = perplexity_ratio(*columns["candidate"], *each, seed, resamples)
    return {name: as_json(estimate) for name, estimate in found.items()}
