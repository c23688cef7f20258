"""One PPO update: roll out, score, estimate advantages, optimise. The steps stand in the paper's order.

Shapes: B completions of one update, T positions of right-padded prompt + completion, M members of the reward model.

Ouyang 2022, section 3.5 and appendix C.3; the details follow Huang 2024 (2403.17031).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from components.ppo_finetune.roles import Roles
from components.rlhf import ppo
from components.rlhf.distributed import as_many, processes, rank, summed, total
from components.rlhf.likelihood import add_nll_gradient
from components.rlhf.mismatch import Mismatch, mismatch, sampler_weights
from components.rlhf.models import Role
from components.rlhf.optimisation import Optimiser
from components.rlhf.reward import Aggregation, Centring, aggregate, batch_scores
from components.rlhf.rollout import Completion, token_logprobs
from components.rlhf.tokens import Batch, Encoded, length_batches, right_pad

POLICY_SUMS = ("policy_loss", "clip_fraction", "kl_old")


class Knobs(Protocol):
    """What an update needs of the stage's configuration; meanings and units stand there."""

    temperature: float
    no_eos_score: float
    cut_completions: Literal["fixed", "scored"]
    reward_aggregation: Aggregation
    variance_weight: float
    micro_batch_tokens: int
    epochs: int
    value_epochs: int
    minibatches: int
    gamma: float
    lam: float
    clip: float
    value_clip: float
    value_coefficient: float
    whiten_rewards: bool
    max_kl_old: float
    rollout_engine: Literal["torch", "vllm"]
    sampler_ratio_cap: float
    pretraining_coefficient: float


class Experience(NamedTuple):
    """What the old policy did, and what is thought of it.

    Fields:
        completions: the B completions as sampled.
        batch: the same, right-padded.
        scores_B: centred score of the reward model, of an ensemble the members' aggregated; where EOS is missing `no_eos_score`, or
            the score with EOS put there.
        judge_B: the judge's, in the same way. Never optimised.
        logprobs_old_BT, logprobs_reference_BT: at the sampling temperature, 0 outside the completion.
        values_old_BT: value before each completion token, 0 elsewhere.
        entropy: mean over completion tokens, nats.
        mismatch: of the sampler's log-probabilities and a fresh forward's, in nats.
        disagreement: of an ensemble, the mean over completions of the members' standard deviation, in deviations of the score.
        sampler_weights_BT: of the tokens in the policy's loss, where another engine drew them (`rlhf.mismatch`).
    """

    completions: list[Completion]
    batch: Batch
    scores_B: Tensor
    judge_B: Tensor
    logprobs_old_BT: Tensor
    logprobs_reference_BT: Tensor
    values_old_BT: Tensor
    entropy: float
    mismatch: Mismatch
    disagreement: float | None = None
    sampler_weights_BT: Tensor | None = None


class Optimisers(NamedTuple):
    policy: Optimiser
    value: Optimiser


class MicroBatch(NamedTuple):
    """Rows of an update's batch, cut to their longest: their indices [b], what they hold, and the factor by which they count.

    It is 0 where a process only takes part, because the layers are divided and others have more micro-batches.
    """

    rows_B: Tensor
    part: Batch
    counts: float = 1.0


@torch.no_grad()
def look_at(knobs: Knobs, roles: Roles, completions: list[Completion]) -> Experience:
    """Scores, log-probabilities and values of completions, before anything is optimised."""
    pad_id, device = roles.tokenizer.pad_token_id, roles.policy.device
    prompts, answers = [c.prompt_ids for c in completions], [c.token_ids for c in completions]
    ended_B = torch.tensor([c.ended for c in completions])
    ends = [c.token_ids if c.ended else [*c.token_ids, roles.tokenizer.eos_token_id] for c in completions]
    closed = right_pad(prompts, ends, pad_id).to(device)  # the text that is scored ends with EOS
    batch = right_pad(prompts, answers, pad_id).to(device)

    def micro_rows(padded: Batch) -> list[MicroBatch]:
        return _micro_rows(padded, range(len(completions)), knobs.micro_batch_tokens, roles.divided)

    if roles.trunk is not None:
        trunk = roles.trunk
        (trunk_BTD,) = _own_rows(closed, micro_rows(closed), lambda part: (trunk(part.ids_BT),))
        closed = closed._replace(trunk_BTD=trunk_BTD)
        batch = batch._replace(trunk_BTD=trunk_BTD[:, : batch.ids_BT.shape[1]])  # an EOS behind changes nothing in front

    def scored(role: Role, centring: Centring) -> Tensor:
        raw_B = torch.zeros(len(completions))
        for rows_B, part, _ in micro_rows(closed):
            raw_B[rows_B.cpu()] = batch_scores(role, part).cpu()
        return centring(summed(raw_B))

    def kept(scores_B: Tensor) -> Tensor:
        kept_B = ended_B | (knobs.cut_completions == "scored")
        return torch.where(kept_B, scores_B, knobs.no_eos_score).to(device)

    members_MB = torch.stack([scored(*member) for member in roles.members])
    scores_B = kept(aggregate(members_MB, knobs.reward_aggregation, knobs.variance_weight))
    judge_B = kept(scored(roles.judge, roles.judge_centring))

    def forward(role: Role, part: Batch) -> tuple[Tensor, Tensor]:
        return token_logprobs(role, part, temperature=knobs.temperature, pad_id=pad_id, with_entropy=role is roles.policy)

    logprobs_old_BT, entropy_BT = _over_rows(batch, micro_rows(batch), lambda part: forward(roles.policy, part))
    logprobs_reference_BT, _ = _over_rows(batch, micro_rows(batch), lambda part: forward(roles.reference, part))
    (values_old_BT,) = _over_rows(batch, micro_rows(batch), lambda part: (token_values(roles.value, part),))
    mask_BT = batch.completion_mask_BT
    sampled_BT = torch.zeros_like(logprobs_old_BT).masked_scatter(mask_BT, torch.cat([c.logprobs for c in completions]).to(device))
    corrected = knobs.rollout_engine != "torch" and knobs.sampler_ratio_cap > 0
    return Experience(
        completions,
        batch,
        scores_B,
        judge_B,
        logprobs_old_BT,
        logprobs_reference_BT,
        values_old_BT,
        float(ppo.masked_mean(entropy_BT, mask_BT)),
        mismatch(logprobs_old_BT, sampled_BT, mask_BT),
        float(members_MB.std(0, correction=0).mean()) if len(roles.members) > 1 else None,
        sampler_weights(logprobs_old_BT, sampled_BT, mask_BT, knobs.sampler_ratio_cap) if corrected else None,
    )


def token_values(role: Role, batch: Batch) -> Tensor:
    """Value before each completion token [B, T]: the head at the token in front of it; 0 outside the completion."""
    hidden_BTD = role.hidden(batch.ids_BT, trunk_BTD=batch.trunk_BTD)
    values_BT = role.head(hidden_BTD.to(role.head.weight.dtype)).float().squeeze(-1)
    shifted_BT = torch.cat([values_BT[:, :1], values_BT[:, :-1]], 1)
    return torch.where(batch.completion_mask_BT, shifted_BT, 0.0)


def optimise(
    knobs: Knobs,
    roles: Roles,
    optimisers: Optimisers,
    experience: Experience,
    beta: float,
    order: torch.Generator,
    critic_only: bool,
    pretraining: Sequence[Encoded] = (),
) -> dict[str, float]:
    """Several epochs over the experience; gives the means of the losses and what else is logged of them.

    Args:
        beta: coefficient of the KL penalty.
        order: shuffles the rows of an epoch.
        critic_only: leaves the policy as it is (critic warm-up).
        pretraining: examples whose likelihood is raised beside, in equal shares in each step (PPO-ptx: Ouyang 2022, equation 2).

    Where the policy has gone further than `max_kl_old` from the one that sampled, it stays there for the rest of the update; the
    value model goes on.
    """
    batch, mask_BT = experience.batch, experience.batch.completion_mask_BT
    rewards_BT = ppo.token_rewards(experience.scores_B, experience.logprobs_old_BT, experience.logprobs_reference_BT, mask_BT, beta)
    if knobs.whiten_rewards:
        rewards_BT = ppo.whiten(rewards_BT, mask_BT, keep_mean=True)
    advantages_BT, returns_BT = ppo.advantages_and_returns(
        rewards_BT, experience.values_old_BT, mask_BT, gamma=knobs.gamma, lam=knobs.lam
    )
    advantages_BT = ppo.whiten(advantages_BT, mask_BT)

    seen: dict[str, list[float]] = {}
    policy_learns, policy_steps = not critic_only, 0
    value_steps = (knobs.value_epochs or knobs.epochs) * knobs.minibatches
    steps = [rows for _ in range(knobs.epochs) for rows in torch.randperm(len(mask_BT), generator=order).chunk(knobs.minibatches)]
    for step, (rows, examples) in enumerate(zip(steps, _shares(pretraining, len(steps)), strict=True)):
        micro = _micro_rows(batch, rows.tolist(), knobs.micro_batch_tokens, roles.divided)
        sums: dict[str, float] = {}
        if policy_learns:
            sums |= add_policy_gradient(knobs, roles, experience, advantages_BT, micro)
            if knobs.max_kl_old and sums["kl_old"] > knobs.max_kl_old:
                optimisers.policy.discard()
                policy_learns = False
            else:
                if examples:
                    sums["pretraining_loss"] = add_nll_gradient(
                        roles.policy,
                        examples,
                        roles.tokenizer.pad_token_id,
                        knobs.micro_batch_tokens,
                        weight=knobs.pretraining_coefficient,
                    )
                sums["gradient_norm"] = optimisers.policy.step()
                policy_steps += 1
        if step < value_steps:
            sums |= add_value_gradient(knobs, roles, experience, returns_BT, micro)
            sums["value_gradient_norm"] = optimisers.value.step()
        for key, number in sums.items():
            seen.setdefault(key, []).append(number)
    means = dict.fromkeys(POLICY_SUMS, 0.0) | {key: sum(numbers) / len(numbers) for key, numbers in seen.items()}
    return {
        **means,
        "policy_steps": float(policy_steps),
        "explained_variance": ppo.explained_variance(experience.values_old_BT, returns_BT, mask_BT),
    }


def add_policy_gradient(
    knobs: Knobs, roles: Roles, experience: Experience, advantages_BT: Tensor, micro: Sequence[MicroBatch]
) -> dict[str, float]:
    """Adds the gradient of one minibatch's clipped surrogate to the policy; gives what is logged of it, token means."""
    tokens = _tokens_of_all(micro)
    sums = dict.fromkeys(POLICY_SUMS, 0.0)
    for rows_B, part, counts in micro:
        cut = part.ids_BT.shape[1]
        logprobs_BT, _ = token_logprobs(roles.policy, part, temperature=knobs.temperature, pad_id=roles.tokenizer.pad_token_id)
        loss = ppo.policy_loss(
            logprobs_BT,
            experience.logprobs_old_BT[rows_B, :cut],
            advantages_BT[rows_B, :cut],
            part.completion_mask_BT,
            knobs.clip,
            None if experience.sampler_weights_BT is None else experience.sampler_weights_BT[rows_B, :cut],
        )
        (loss.total * counts / tokens).backward()
        sums["policy_loss"] += loss.total.item() * counts / tokens
        sums["clip_fraction"] += loss.clipped.item() * counts / tokens
        sums["kl_old"] += loss.kl_old.item() * counts / tokens
    return dict(zip(sums, total(*sums.values()), strict=True))


def add_value_gradient(
    knobs: Knobs, roles: Roles, experience: Experience, returns_BT: Tensor, micro: Sequence[MicroBatch]
) -> dict[str, float]:
    """Adds the gradient of one minibatch's clipped value loss; apart from the policy's, so that one gradient is held at a time."""
    tokens = _tokens_of_all(micro)
    sums = {"value_loss": 0.0, "value_clip_fraction": 0.0}
    for rows_B, part, counts in micro:
        cut = part.ids_BT.shape[1]
        loss = ppo.value_loss(
            token_values(roles.value, part),
            experience.values_old_BT[rows_B, :cut],
            returns_BT[rows_B, :cut],
            part.completion_mask_BT,
            knobs.value_clip,
        )
        (knobs.value_coefficient * loss.total * counts / tokens).backward()
        sums["value_loss"] += loss.total.item() * counts / tokens
        sums["value_clip_fraction"] += loss.clipped.item() * counts / tokens
    return dict(zip(sums, total(*sums.values()), strict=True))


def statistics(experience: Experience) -> dict[str, float]:
    """What is logged of a rollout: means over completions, and over completion tokens only."""
    mask_BT = experience.batch.completion_mask_BT
    kl_B = torch.where(mask_BT, experience.logprobs_old_BT - experience.logprobs_reference_BT, 0.0).sum(1)
    kl_reference = float(kl_B.mean())
    texts = [c.text for c in experience.completions]
    most = max(texts.count(text) for text in set(texts))
    return {
        "reward": float(experience.scores_B.mean()),
        "judge_reward": float(experience.judge_B.mean()),
        "judge_error": float(experience.judge_B.std(correction=0)) / math.sqrt(len(experience.judge_B)),
        "kl_reference": kl_reference,
        "sqrt_kl_reference": math.sqrt(max(0.0, kl_reference)),
        "entropy": experience.entropy,
        "completion_tokens": float(mask_BT.sum(1).float().mean()),
        "eos_fraction": sum(c.ended for c in experience.completions) / len(texts),
        "same_answer_fraction": most / len(texts),
        "logprob_mismatch": experience.mismatch.largest,
        "logprob_mismatch_mean": experience.mismatch.mean,
        "kl_sampler": experience.mismatch.kl,
        **({} if experience.disagreement is None else {"reward_disagreement": experience.disagreement}),
    }


class Stopwatch:
    """Seconds per phase of an update."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{phase}_seconds"] = now - self._started
        self._started = now


def _shares(examples: Sequence[Encoded], parts: int) -> list[Sequence[Encoded]]:
    """The examples in `parts` consecutive shares of equal size."""
    size = len(examples) // parts
    return [examples[number * size : (number + 1) * size] for number in range(parts)]


def _micro_rows(batch: Batch, rows: Sequence[int], max_tokens: int, together: bool) -> list[MicroBatch]:
    """Length-sorted groups of rows, each cut to its longest.

    Of several processes each has every n-th row of an update, always the same: of these it holds what the trunk makes.

    Args:
        together: every process must have as many groups. One that has fewer looks at the first of its rows again.
    """
    lengths = batch.attention_BT.sum(1).tolist()
    own = [row for row in rows if row % processes() == rank()]
    groups = [[own[i] for i in group] for group in length_batches([lengths[row] for row in own], max_tokens)]
    result = []
    for group, counts in as_many(groups, [rank()]) if together else ((group, 1.0) for group in groups):
        index_B = torch.tensor(group, device=batch.ids_BT.device)
        result.append(MicroBatch(index_B, batch.rows(index_B, max(lengths[row] for row in group)), counts))
    return result


def _tokens_of_all(micro: Sequence[MicroBatch]) -> float:
    """Completion tokens of the minibatch, whatever its micro-batches and processes."""
    (tokens,) = total(sum(int(part.completion_mask_BT.sum()) * counts for _, part, counts in micro))
    return tokens


def _over_rows(batch: Batch, micro: Sequence[MicroBatch], look: Callable[[Batch], tuple[Tensor, ...]]) -> list[Tensor]:
    """Applies `look` to micro-batches of all processes and puts the [b, t, ...] results together as [B, T, ...]."""
    return [summed(values) for values in _own_rows(batch, micro, look)]


def _own_rows(batch: Batch, micro: Sequence[MicroBatch], look: Callable[[Batch], tuple[Tensor, ...]]) -> list[Tensor]:
    """As `_over_rows`; rows of other processes are 0."""
    results: list[Tensor] = []
    for rows_B, part, _ in micro:
        for number, values in enumerate(look(part)):
            if number == len(results):
                results.append(values.new_zeros((*batch.ids_BT.shape, *values.shape[2:])))
            results[number][rows_B, : values.shape[1]] = values
    return results
