"""Samples each policy's answers to the held-out prompts and the probes, lets it read text, and scores the answers.

One model is in memory at a time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from components.evaluate.instructions import Instruction
from components.evaluate.measures import Answer, Reading
from components.evaluate.refusals import Probe
from components.rlhf.models import Precision, context_tokens, load_policy, load_scorer, member_folders
from components.rlhf.records import Message, Ranking, prompt_key
from components.rlhf.reward import Aggregation, aggregate, score
from components.rlhf.rollout import Completion, completion_logprobs, prompt_limit, sample
from components.rlhf.spread import load_spread
from components.rlhf.tokens import PromptTooLong, encode_completion, encode_prompt
from components.services.exits import DoNotRetry
from components.services.launch import Context
from components.simulated_world import truth

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kind = TypeVar("Kind", Probe, Instruction)


class Sampling(NamedTuple):
    """How answers are drawn: as in the config of the stage."""

    max_new_tokens: int
    max_prompt_tokens: int
    temperature: float
    batch_size: int
    seed: int
    precision: Precision


class Drawn(NamedTuple):
    """What was sampled and read; only prompts that every policy answered, in their order.

    Fields:
        completions: {policy: {index of the prompt: completion}}.
        log_ratios: of the candidate's completions, log p(candidate) - log p(SFT) in nats; NaN where SFT is not among the policies.
        cut: prompts that were cut at the front to fit a policy's context.
        answers_read: {policy: its completions, as SFT reads them at the sampling temperature}, of candidate and SFT.
        texts_read: {policy: the texts of each prompt, as this policy reads them at temperature 1}, of candidate and SFT.
        probes: those that every policy answered.
        probe_answers: {policy: text of its answer to each of them}.
        plain_read: {policy: each plain text as it reads it at temperature 1, with the number of its words}; those that fit every
            policy's context.
    """

    completions: dict[str, dict[int, Completion]]
    log_ratios: dict[int, float]
    cut: set[int]
    answers_read: dict[str, list[Reading]]
    texts_read: dict[str, list[Reading]]
    probes: list[Probe | Instruction]
    probe_answers: dict[str, list[str]]
    plain_read: dict[str, list[Reading]]

    def answers_to(self, kind: type[Kind]) -> tuple[list[Kind], dict[str, list[str]]]:
        """The probes of one kind, and {policy: its answer to each}."""
        rows = [(i, each) for i, each in enumerate(self.probes) if isinstance(each, kind)]
        return [each for _, each in rows], {policy: [given[i] for i, _ in rows] for policy, given in self.probe_answers.items()}


def choose_prompts(rankings: Iterable[Ranking], count: int, seed: int) -> tuple[list[list[Message]], set[str]]:
    """`count` distinct prompts and the sources of all rankings.

    Prompts are taken in the order of a seeded hash, so that a snapshot that has grown keeps most of the prompts of the one before.
    """
    sources: set[str] = set()
    seen: set[str] = set()

    def ordered() -> Iterable[tuple[bytes, str, list[Message]]]:
        for ranking in rankings:
            sources.add(ranking.source)
            key = prompt_key(ranking.prompt)
            if key not in seen:
                seen.add(key)
                yield hashlib.sha256(f"{seed}:{key}".encode()).digest(), key, ranking.prompt

    return [prompt for _, _, prompt in heapq.nsmallest(count, ordered(), key=lambda each: each[:2])], sources


def first_ranked(rankings: Iterable[Ranking], prompts: Sequence[list[Message]]) -> list[list[str]]:
    """The distinct completions of each prompt that a rater ranked first, ties included, in the order of their text."""
    found: dict[str, set[str]] = {prompt_key(prompt): set() for prompt in prompts}
    for ranking in rankings:
        if (texts := found.get(prompt_key(ranking.prompt))) is not None:
            texts |= {text for text, rank in zip(ranking.completions, ranking.ranks, strict=True) if rank == 1}
    return [sorted(found[prompt_key(prompt)]) for prompt in prompts]


def draw(
    context: Context,
    policies: Mapping[str, str],
    prompts: Sequence[list[Message]],
    sampling: Sampling,
    texts: Sequence[Sequence[str]] = (),
    probes: Sequence[Probe | Instruction] = (),
    plain: Sequence[str] = (),
) -> Drawn:
    """One answer per prompt and policy, for the prompts that fit every policy's context, and what else a policy has to do.

    All policies draw with the same random numbers, which makes the comparison sharper and equal policies tie.

    Args:
        policies: {name: s3:// folder}, "candidate" before "sft".
        texts: of each prompt, for candidate and SFT to read; none: nothing is read.
        probes: prompts that every policy answers, too.
        plain: texts without a prompt, for every policy to read.

    Raises:
        DoNotRetry: a folder is not a policy; candidate and SFT do not share a vocabulary; or no prompt fits.
    """
    indices = list(range(len(prompts)))
    completions: dict[str, dict[int, Completion]] = {}
    probed: dict[str, dict[int, str]] = {}
    candidate_logprobs: list[float] = []
    candidate_vocabulary: dict[str, int] = {}
    log_ratios: dict[int, float] = {}
    answers_read: dict[str, dict[int, Reading]] = {}
    texts_read: dict[str, dict[int, Reading]] = {}
    plain_read: dict[str, dict[int, Reading]] = {}
    cut: set[int] = set()
    for name, uri in policies.items():
        model, tokenizer = _loaded(_fetch(context, name, uri, "policy"), uri, "policy", sampling.precision)
        limit_tokens = prompt_limit(model.config, sampling.max_new_tokens, sampling.max_prompt_tokens)
        was_cut = {i: _was_cut(tokenizer, prompts[i], limit_tokens) for i in indices}
        indices = [i for i in indices if was_cut[i] is not None]
        cut |= {i for i in indices if was_cut[i]}
        if not indices:
            raise DoNotRetry(
                f"none of the {len(prompts)} held-out prompts fits {limit_tokens} tokens: {uri} has a context of "
                f"{context_tokens(model.config)}, and evaluate.max_new_tokens is {sampling.max_new_tokens}",
                "lower evaluate.max_new_tokens, raise evaluate.max_prompt_tokens, or use a model with a longer context",
            )
        asked = [(i, prompts[i]) for i in indices]
        completions[name] = _sample(context, f"answers of {name}", model, tokenizer, asked, sampling)
        fitting = [(i, each.prompt) for i, each in enumerate(probes) if _was_cut(tokenizer, each.prompt, limit_tokens) is not None]
        answers = _sample(context, f"answers of {name} to probes", model, tokenizer, fitting, sampling)
        probed[name] = {i: each.text for i, each in answers.items()}
        plain_read[name] = _read_plain(model, tokenizer, plain, sampling)
        ours = completions["candidate"]
        if name == "candidate":
            candidate_vocabulary = tokenizer.get_vocab()
            candidate_logprobs = _logprobs(model, tokenizer, list(ours.values()), sampling)
        elif name == "sft":
            if tokenizer.get_vocab() != candidate_vocabulary:
                raise DoNotRetry(
                    f"{policies['candidate']} and {uri} have different vocabularies, so there is no KL between them",
                    "give evaluate the SFT policy from which the candidate was trained",
                )
            reference = dict(zip(ours, _logprobs(model, tokenizer, list(ours.values()), sampling), strict=True))
            log_ratios = {i: logprob - reference[i] for i, logprob in zip(ours, candidate_logprobs, strict=True)}
            own = {i: float(each.logprobs.double().sum()) for i, each in completions["sft"].items()}  # as the sampler saw them
            for policy, logprobs in (("candidate", reference), ("sft", own)):
                lengths = {i: len(each.token_ids) for i, each in completions[policy].items()}
                answers_read[policy] = {i: Reading(-logprobs[i], lengths[i]) for i in logprobs}
        if texts and name in ("candidate", "sft"):
            texts_read[name] = _read(model, tokenizer, asked, texts, limit_tokens, sampling)
        del model  # before the next one is loaded
    by_all = [i for i in range(len(plain)) if all(i in each for each in plain_read.values())]
    everywhere = [i for i in range(len(probes)) if all(i in each for each in probed.values())]
    return Drawn(
        {name: {i: each[i] for i in indices} for name, each in completions.items()},
        {i: log_ratios.get(i, math.nan) for i in indices},
        cut & set(indices),
        {name: [each[i] for i in indices] for name, each in answers_read.items()},
        {name: [each[i] for i in indices] for name, each in texts_read.items()},
        [probes[i] for i in everywhere],
        {name: [each[i] for i in everywhere] for name, each in probed.items()},
        {name: [each[i] for i in by_all] for name, each in plain_read.items()},
    )


def score_all(
    context: Context,
    scorers: Mapping[str, str],
    prompts: Sequence[list[Message]],
    drawn: Drawn,
    sampling: Sampling,
    how: tuple[Aggregation, float] = ("mean", 0.0),
) -> dict[str, list[Answer]]:
    """Answers of each policy with the scores of each scorer, in the order of the prompts that all policies answered.

    Args:
        scorers: {name: s3:// folder of a reward model}; "true" is the simulated world's preference and has no folder.
        how: an ensemble's members make one score, as `aggregated_by` tells.
    """
    indices = list(drawn.log_ratios)
    asked = [prompts[i] for i in indices]
    texts = {policy: [each[i].text for i in indices] for policy, each in drawn.completions.items()}
    scores: dict[str, dict[str, list[float]]] = {}
    for name, uri in scorers.items():
        if name == "true":
            scores[name] = {policy: _true_scores(asked, given) for policy, given in texts.items()}
            continue
        role = "judge_model" if name == "judge" else "reward_model"
        by_member: dict[str, list[Tensor]] = {policy: [] for policy in texts}
        for folder in member_folders(_fetch(context, name, uri, role)):
            model, tokenizer = _loaded(folder, uri, role, sampling.precision)
            try:
                for policy, given in context.progress.track(texts.items(), len(texts), f"scores of {name}"):
                    by_member[policy].append(score(model, tokenizer, asked, given, batch_size=sampling.batch_size))
            except PromptTooLong as error:
                raise DoNotRetry(f"{uri}: {error}", "lower evaluate.max_new_tokens") from error
            del model  # before the next one is loaded
        scores[name] = {policy: aggregate(torch.stack(each), *how).tolist() for policy, each in by_member.items()}
    return {
        policy: [
            Answer(each[i].text, len(each[i].token_ids), each[i].ended, {name: scores[name][policy][row] for name in scorers})
            for row, i in enumerate(indices)
        ]
        for policy, each in drawn.completions.items()
    }


def aggregated_by(candidate: Mapping[str, Any]) -> tuple[Aggregation, float]:
    """How PPO made one score of an ensemble's members, by the candidate's marker; the mean where it was not PPO."""
    config = candidate.get("config", {})
    return config.get("reward_aggregation", "mean"), config.get("variance_weight", 0.0)


def _fetch(context: Context, name: str, uri: str, role: str) -> Path:
    """The local folder of a model."""
    folder = context.scratch / "models" / name
    shutil.rmtree(folder, ignore_errors=True)  # two candidates have the same name in turn
    marker = context.storage.fetch_folder(uri, folder)
    if marker.get("role") != role:
        raise DoNotRetry(f"{uri} is a {marker.get('role')!r}, not a {role!r}", f"correct the input for the {name}")
    return folder


def _loaded(folder: Path, uri: str, role: str, precision: Precision) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    load = load_policy if role == "policy" else load_scorer
    try:
        return load_spread(lambda place: load(folder, precision, place))
    except (ValueError, OSError) as error:
        raise DoNotRetry(f"{uri} cannot be loaded: {error}", "run the stage that writes it again") from error


def _was_cut(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], limit_tokens: int) -> bool | None:
    """Whether a prompt has to be cut at the front; None if not even its last line fits."""
    try:
        return encode_prompt(tokenizer, prompt, limit_tokens)[1]
    except PromptTooLong:
        return None


def _sample(
    context: Context,
    what: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, list[Message]]],
    sampling: Sampling,
) -> dict[int, Completion]:
    batches = [prompts[first : first + sampling.batch_size] for first in range(0, len(prompts), sampling.batch_size)]
    found: dict[int, Completion] = {}
    for number, batch in enumerate(context.progress.track(batches, len(batches), what)):
        drawn = sample(
            model,
            tokenizer,
            [prompt for _, prompt in batch],
            max_new_tokens=sampling.max_new_tokens,
            max_prompt_tokens=sampling.max_prompt_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed * 1_000_003 + number,  # of the batch alone: policies stay in step though one answers longer
            batch_size=sampling.batch_size,
        )
        found.update(zip((i for i, _ in batch), drawn, strict=True))
    return found


def _logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion], sampling: Sampling
) -> list[float]:
    """Log-probability of each completion at the sampling temperature, summed over its tokens, in nats.

    Batches are of `batch_size` rows; of fewer where these are longer than any answer with its prompt, as plain texts may be.
    """
    longest = max(len(each.prompt_ids) + len(each.token_ids) for each in completions)
    answer = prompt_limit(model.config, sampling.max_new_tokens, sampling.max_prompt_tokens) + sampling.max_new_tokens
    max_tokens = sampling.batch_size * min(longest, answer)
    each = completion_logprobs(model, tokenizer, completions, temperature=sampling.temperature, max_tokens=max_tokens)
    return [float(logprobs.double().sum()) for logprobs in each]


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, list[Message]]],
    texts: Sequence[Sequence[str]],
    limit_tokens: int,
    sampling: Sampling,
) -> dict[int, Reading]:
    """The texts of each prompt as a policy reads them, up to the length that an answer may have, so that all of them fit."""
    rows: list[tuple[int, Completion]] = []
    for i, prompt in prompts:
        prompt_ids, _ = encode_prompt(tokenizer, prompt, limit_tokens)
        for text in texts[i]:
            token_ids = encode_completion(tokenizer, text)[: sampling.max_new_tokens]
            rows.append((i, Completion(prompt_ids, token_ids, text, True, torch.empty(0))))
    logprobs = _logprobs(model, tokenizer, [each for _, each in rows], sampling._replace(temperature=1.0))
    read: dict[int, Reading] = {}
    for (i, each), logprob in zip(rows, logprobs, strict=True):
        before = read.get(i, Reading(0.0, 0))
        read[i] = Reading(before.nats - logprob, before.tokens + len(each.token_ids))
    return read


def _read_plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], sampling: Sampling
) -> dict[int, Reading]:
    """Texts that fit the context, each after its own first token; by words, because policies may differ in their tokens."""
    rows: dict[int, Completion] = {}
    for i, text in enumerate(texts):
        token_ids = tokenizer.encode(text)
        if 1 < len(token_ids) <= context_tokens(model.config):
            rows[i] = Completion(token_ids[:1], token_ids[1:], text, True, torch.empty(0))
    logprobs = _logprobs(model, tokenizer, list(rows.values()), sampling._replace(temperature=1.0)) if rows else []
    return {i: Reading(-logprob, len(texts[i].split())) for i, logprob in zip(rows, logprobs, strict=True)}


def _true_scores(prompts: Sequence[list[Message]], texts: Sequence[str]) -> list[float]:
    try:
        return [truth.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    except ValueError as error:
        raise DoNotRetry(
            f"evaluate.truth = 'simulated', but the rankings are not simulated: {error}", "set evaluate.truth to none"
        ) from error


def read_training(folder: Path) -> list[dict[str, Any]]:
    """What was recorded of the candidate's training, PPO's updates or DPO's steps; empty where nothing was."""
    path = folder / "training.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if "update" in row or "margin" in row]  # SFT's steps have neither
