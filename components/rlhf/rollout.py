"""Rollouts: sampling completions with a key-value cache, and the log-probabilities of what was sampled.

Shapes: B prompts, T tokens, V vocabulary, D hidden, N tokens of all rows that are looked at.

Sampling is with temperature only: top-k, top-p or a repetition penalty would draw from another distribution than the one whose
log-probabilities enter the KL term and the ratio (Huang 2024, detail 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from components.rlhf.distributed import any_of
from components.rlhf.models import Role, context_tokens, policy_role
from components.rlhf.records import Message
from components.rlhf.tokens import Batch, encode_prompt, left_pad, length_batches, right_pad

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGIT_BYTES = 24 * 2**20  # vocabulary-sized work is cut into chunks; beyond 32 MiB each would be fetched anew, page by page
PREFILL_MICRO_BATCHES = 4  # in one piece of a prefill: without gradients it holds one layer's activations where training holds all
NEVER = -1e30  # logit of the pad token, which is never an answer; finite, for 0 times infinity is not a number


class Completion(NamedTuple):
    """What a policy answered to a prompt.

    Fields:
        prompt_ids: the prompt as the policy saw it.
        token_ids: the sampled tokens, EOS included if it came.
        text: without EOS.
        ended: whether EOS came within the budget.
        logprobs: of each sampled token at the sampling temperature, as the sampler saw it, float32 [T].
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    ended: bool
    logprobs: Tensor


@torch.no_grad()
def sample_tokens(
    role: Role,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    pad_id: int,
    eos_id: int,
    generator: torch.Generator,
    samples: int = 1,
    among: tuple[int, slice] | None = None,
    prefill_tokens: int = 0,
) -> list[tuple[list[int], Tensor]]:
    """Samples `samples` completions per prompt, all in one batch; gives (token ids, log-probabilities), prompt by prompt.

    A prompt is computed once for its samples. One uniform number per row and step is drawn for the whole batch, finished or not, so
    that what a row draws does not depend on when the others end. Rows that ended leave the batch.

    Where the role's layers are divided over the processes, every process must sample at the same time.

    Args:
        among: these prompts are `among[1]` of so many; numbers are drawn for all, so that a row draws what it would among them.
        prefill_tokens: the prompts are read in groups of rows of at most so many tokens (one row at least), which changes nothing
            but memory; 0: all at once.
    """
    from transformers import DynamicCache

    role.activate()
    device = role.device

    def forward(cache: DynamicCache, inputs_BT: Tensor, attention_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states [B, D] of the last tokens."""
        if role.divided:
            any_of(True)  # calls those that have ended to take part in this pass
        hidden_BTD: Tensor = role.backbone(
            input_ids=inputs_BT,
            attention_mask=attention_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BTD[:, -1]

    ids_BT, attention_BT = (each.to(device) for each in left_pad(prompts, pad_id))
    positions_BT = (attention_BT.cumsum(1) - 1).clamp(min=0)
    size = max(1, prefill_tokens // ids_BT.shape[1]) if prefill_tokens else len(ids_BT)
    caches, last = [], []
    for piece in zip(*(each.split(size) for each in (ids_BT, attention_BT, positions_BT)), strict=True):
        caches.append(DynamicCache())
        last.append(forward(caches[-1], *piece))
    cache, hidden_BD = _one_cache(caches), torch.cat(last)
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden_BD, attention_BT = (each.repeat_interleave(samples, 0) for each in (hidden_BD, attention_BT))
    rows = len(hidden_BD)
    whole, own = (rows, slice(None)) if among is None else (among[0] * samples, among[1])
    position_B = attention_BT.sum(1) - 1
    rows_B = torch.arange(rows, device=device)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    for step in range(1, max_new_tokens + 1):
        uniform = torch.rand(whole, generator=generator, dtype=torch.float64).view(-1, samples)[own].flatten().to(device)
        logprobs_BV = torch.log_softmax(_scaled_logits(hidden_BD, role.head.weight, role.head.bias, temperature, pad_id), -1)
        cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
        drawn_B1 = uniform[rows_B, None] * cumulative_BV[:, -1:]
        next_B = torch.searchsorted(cumulative_BV, drawn_B1, right=True).squeeze(1).clamp(max=cumulative_BV.shape[1] - 1)
        chosen_B = logprobs_BV.gather(1, next_B[:, None]).squeeze(1)
        for row, token, logprob in zip(rows_B.tolist(), next_B.tolist(), chosen_B.tolist(), strict=True):
            tokens[row].append(token)
            logprobs[row].append(logprob)
        active = (next_B != eos_id).nonzero().squeeze(1)
        if len(active) == 0 or step == max_new_tokens:
            break
        if len(active) < len(rows_B):
            _keep_rows(cache, active)
            rows_B, next_B, position_B, attention_BT = (each[active] for each in (rows_B, next_B, position_B, attention_BT))
        position_B = position_B + 1
        attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(active), 1)], 1)
        hidden_BD = forward(cache, next_B[:, None], attention_BT, position_B[:, None])
    while role.divided and any_of(False)[0]:
        role.hidden(ids_BT[:1, -1:])  # its part of the layers is needed for as long as another process samples
    return [(ids, torch.tensor(values)) for ids, values in zip(tokens, logprobs, strict=True)]


def _keep_rows(cache: DynamicCache, rows_A: Tensor) -> None:
    """Drops all other rows, on whatever device a layer has its keys (`rlhf.spread`)."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", rows_A)  # a layer of another kind than attention has none
        layer.batch_select_indices(rows_A.to(keys.device))


def _one_cache(caches: list[DynamicCache]) -> DynamicCache:
    """The rows of all of them; they give up what they hold, layer by layer."""
    from transformers import DynamicCache

    if len(caches) == 1:
        return caches[0]
    whole = DynamicCache()
    for number in range(len(caches[0])):
        layers = [each.layers[number] for each in caches]
        whole.update(torch.cat([each.keys for each in layers]), torch.cat([each.values for each in layers]), number)
        for each in layers:
            each.keys = each.values = None
    return whole


def to_completion(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: list[int], logprobs: Tensor) -> Completion:
    """The record of a sampled sequence."""
    ended = ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
    return Completion(list(prompt), ids, text, ended, logprobs)


def prompt_limit(config: PretrainedConfig, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """Tokens that a prompt may have: what the context leaves beside a completion, or less where less is asked for."""
    left = context_tokens(config) - max_new_tokens
    return min(left, max_prompt_tokens) if max_prompt_tokens else left


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    max_prompt_tokens: int = 0,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One completion per prompt. The same arguments give the same completions.

    Args:
        max_prompt_tokens: longer prompts are cut at the front; 0: what the context leaves.
        progress: called with the number of prompts done after each batch.

    Raises:
        PromptTooLong: a prompt and `max_new_tokens` do not fit the model's context, even cut at the front.
    """
    role = policy_role(model)
    generator = torch.Generator().manual_seed(seed)
    limit = prompt_limit(model.config, max_new_tokens, max_prompt_tokens)
    encoded = [encode_prompt(tokenizer, prompt, limit)[0] for prompt in prompts]
    done: list[Completion] = []
    for first in range(0, len(encoded), batch_size):
        batch = encoded[first : first + batch_size]
        drawn = sample_tokens(
            role,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            generator=generator,
        )
        done += [to_completion(tokenizer, prompt, *each) for prompt, each in zip(batch, drawn, strict=True)]
        if progress:
            progress(len(done))
    return done


def token_logprobs(
    role: Role, batch: Batch, *, temperature: float, pad_id: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token, and the entropy (nats, no gradient) of the distribution it was drawn from.

    Both [B, T] float32, 0 outside the completion; the entropy is 0 unless it is asked for. Vocabulary-sized tensors exist for one
    chunk of tokens at a time, in the backward pass too; [B, T, V] never exists.
    """
    hidden_BTD = role.hidden(batch.ids_BT, trunk_BTD=batch.trunk_BTD)
    predicts_BT = batch.completion_mask_BT[:, 1:]  # position t-1 predicts token t
    targets_N = batch.ids_BT[:, 1:][predicts_BT]
    logprobs_N, entropy_N = ChosenLogprobs.apply(
        hidden_BTD[:, :-1][predicts_BT], role.head.weight, role.head.bias, targets_N, temperature, pad_id, with_entropy
    )
    empty_BT = torch.zeros(batch.completion_mask_BT.shape, device=hidden_BTD.device)
    mask_BT = batch.completion_mask_BT
    return empty_BT.masked_scatter(mask_BT, logprobs_N), empty_BT.masked_scatter(mask_BT, entropy_N)


class ChosenLogprobs(torch.autograd.Function):
    """Log-probabilities [N] of chosen tokens and entropies [N] from hidden states [N, D] and a head's weight [V, D].

    What a backward pass through `log_softmax` would keep, [N, V] several times over, is computed again chunk by chunk:
    the gradient of log p(target) by the logits is onehot(target) - p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        pad_id: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        normaliser_N, entropy_N = torch.empty_like(logprobs_N), torch.zeros_like(logprobs_N)
        buffer = _buffer(hidden_ND, weight_VD)
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = _scaled_logits(hidden_ND[rows], weight_VD, bias_V, temperature, pad_id, buffer)
            highest_C1 = logits_CV.amax(-1, keepdim=True)
            logits_CV.sub_(highest_C1)
            logprobs_N[rows] = logits_CV.gather(1, targets_N[rows, None]).squeeze(1)
            weights_CV = logits_CV.exp() if with_entropy else logits_CV.exp_()
            total_C = weights_CV.sum(-1)
            logprobs_N[rows] -= total_C.log()
            normaliser_N[rows] = highest_C1.squeeze(1) + total_C.log()
            if with_entropy:
                entropy_N[rows] = total_C.log() - weights_CV.mul_(logits_CV).sum(-1) / total_C
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normaliser_N)
        ctx.facts = temperature, pad_id
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, normaliser_N = ctx.saved_tensors
        temperature, pad_id = ctx.facts
        gradient_N = gradients[0] / temperature
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight_VD) if needs_weight else None
        bias_gradient = torch.zeros_like(bias_V) if needs_bias else None
        buffer = _buffer(hidden_ND, weight_VD)
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = _scaled_logits(hidden_ND[rows], weight_VD, bias_V, temperature, pad_id, buffer)
            logits_CV.sub_(normaliser_N[rows, None]).exp_().mul_(-gradient_N[rows, None])
            logits_CV.scatter_add_(1, targets_N[rows, None], gradient_N[rows, None])
            logits_gradient_CV = logits_CV.to(hidden_ND.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = logits_gradient_CV @ weight_VD
            if weight_gradient is not None:
                weight_gradient.addmm_(logits_gradient_CV.T, hidden_ND[rows])
            if bias_gradient is not None:
                bias_gradient += logits_CV.sum(0).to(bias_gradient.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def step_bytes(rows: int, vocabulary: int) -> int:
    """Bytes that a step of sampling holds beside the cache: logits and log-probabilities [rows, vocabulary] in float32, and
    probabilities and their sums in float64.
    """
    return rows * vocabulary * (2 * 4 + 2 * 8)


def _chunk_rows(weight_VD: Tensor) -> int:
    return max(1, LOGIT_BYTES // (4 * len(weight_VD)))


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    size = _chunk_rows(weight_VD)
    return [slice(first, first + size) for first in range(0, len(hidden_ND), size)]


def _buffer(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Room for the logits of one chunk [C, V], used by all of them: new memory costs a page fault for every 4 KiB."""
    return torch.empty((min(len(hidden_ND), _chunk_rows(weight_VD)), len(weight_VD)), device=hidden_ND.device)


def _scaled_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, pad_id: int, buffer_CV: Tensor | None = None
) -> Tensor:
    """Logits [N, V] in float32, divided by the temperature, in the buffer if there is one; the pad token has no probability."""
    if buffer_CV is not None and bias_V is None and weight_VD.dtype == torch.float32:
        logits_NV = torch.mm(hidden_ND, weight_VD.T, out=buffer_CV[: len(hidden_ND)])
    else:
        plain_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
        logits_NV = plain_NV.float() if buffer_CV is None else buffer_CV[: len(hidden_ND)].copy_(plain_NV)
    if temperature != 1:
        logits_NV /= temperature
    logits_NV[:, pad_id] = NEVER
    return logits_NV


@torch.no_grad()
def completion_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    *,
    temperature: float,
    max_tokens: int,
) -> list[Tensor]:
    """Log-probabilities of each completion's tokens under `model`, float32 [T] per completion.

    In length-sorted batches of at most `max_tokens` tokens; one row at least.
    """
    role = policy_role(model)
    lengths = [len(c.prompt_ids) + len(c.token_ids) for c in completions]
    result: list[Tensor] = [torch.empty(0)] * len(completions)
    for rows in length_batches(lengths, max_tokens):
        batch = right_pad(
            [completions[i].prompt_ids for i in rows], [completions[i].token_ids for i in rows], tokenizer.pad_token_id
        ).to(model.device)
        logprobs_BT, _ = token_logprobs(role, batch, temperature=temperature, pad_id=tokenizer.pad_token_id)
        for row, i in enumerate(rows):
            result[i] = logprobs_BT[row][batch.completion_mask_BT[row]].cpu()
    return result
