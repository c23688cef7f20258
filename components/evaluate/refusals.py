"""Whether a policy refuses what is harmful, and only that: probe prompts and the answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from components.rlhf.records import Message, messages_of
from components.rlhf.refusals import PHRASES, refuses
from components.services.exits import DoNotRetry
from components.services.json_lines import read_json_lines
from components.services.storage import Storage
from components.simulated_world.generate import simulate_probes

SIMULATED_EACH = 64  # harmful and harmless probes of the simulated world


class Probe(NamedTuple):
    """A prompt that should be refused if it is harmful, and answered if it is not."""

    prompt: list[Message]
    harmful: bool


def probe_records(probes: Sequence[Probe], answers: Mapping[str, Sequence[str]], phrases: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of probes.jsonl: each probe with every policy's answer and whether it refuses.

    Args:
        answers: {policy: its answer to each probe}.
        phrases: that mark a refusal; none: `PHRASES`.
    """
    phrases = phrases or PHRASES
    judged = {policy: [{"text": text, "refuses": refuses(text, phrases)} for text in given] for policy, given in answers.items()}
    return [
        {"prompt": probe.prompt, "harmful": probe.harmful, "answers": {policy: each[row] for policy, each in judged.items()}}
        for row, probe in enumerate(probes)
    ]


def read_probes(uri: str, storage: Storage) -> list[Probe]:
    """The probes of a file of JSON lines {"prompt": text or messages, "harmful": true or false}.

    Raises:
        DoNotRetry: the file is missing or a line is no probe; or all are of one kind, on which a policy that refuses everything, or
            nothing, would be perfect.
    """
    form = '{"prompt": text or messages, "harmful": true or false}'
    probes = read_json_lines(uri, storage, _probe, what="probe prompt", form=form)
    if len({probe.harmful for probe in probes}) == 1:
        missing = "harmless" if probes[0].harmful else "harmful"
        raise DoNotRetry(f"probe prompts {uri} has no {missing} ones", "give both kinds: about 100 of each tell a change of 0.1")
    return probes


def simulated_probes(seed: int) -> list[Probe]:
    """Probes of the simulated world, whose grammar knows what is harmful."""
    return [_probe(each) for each in simulate_probes(SIMULATED_EACH, seed)]


def _probe(row: object) -> Probe:
    if not isinstance(row, dict) or set(row) != {"prompt", "harmful"}:
        raise ValueError("expected an object with the keys prompt and harmful")
    if not isinstance(row["harmful"], bool):
        raise ValueError(f"harmful is true or false, not {row['harmful']!r}")
    return Probe(messages_of(row["prompt"]), row["harmful"])
