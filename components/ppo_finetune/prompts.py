"""The prompts that PPO answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from components.rlhf.records import iterate_snapshot, prompt_key
from components.rlhf.rollout import prompt_limit
from components.rlhf.tokens import PromptTooLong, encode_prompt
from components.services.exits import DoNotRetry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from components.ppo_finetune.stage import Config

_log = logging.getLogger(__name__)


def read_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, snapshot: Path
) -> tuple[list[list[int]], int]:
    """Distinct prompts of the train split as token ids, and how many were left out because they do not fit.

    Raises:
        DoNotRetry: there are fewer than one update needs.
    """
    put_eos = config.cut_completions == "scored"
    limit = prompt_limit(model_config, config.max_new_tokens + put_eos, config.max_prompt_tokens)
    distinct = {prompt_key(r.prompt): r.prompt for r in iterate_snapshot(snapshot, "train")}
    prompts, left_out, cut = [], 0, 0
    for key in sorted(distinct):
        try:
            ids, was_cut = encode_prompt(tokenizer, distinct[key], limit)
        except PromptTooLong:
            left_out += 1
            continue
        cut += was_cut
        prompts.append(ids)
    if left_out or cut:
        _log.warning("%d prompts do not fit %d tokens and are left out; %d were cut at the front", left_out, limit, cut)
    if len(prompts) < config.batch_prompts:
        raise DoNotRetry(
            f"{len(prompts)} prompts fit the context, and one update takes {config.batch_prompts}",
            "bring more rankings, or lower ppo_finetune.batch_prompts or max_new_tokens",
        )
    return prompts, left_out
