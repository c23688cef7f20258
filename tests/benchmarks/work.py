"""The work that both sides of a comparison do: models, prompts and their options. Needs neither TRL nor rankloop."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of one timed process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines {"prompt": messages}, or {"input_ids": tokens}')
    parser.add_argument("--updates", type=int, default=6, help="the first is not counted")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longer prompts are left out")
    parser.add_argument("--new-tokens", type=int, default=53)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def prompts_of(file: Path, tokenizer: Any, limit_tokens: int) -> list[list[int]]:
    """Token ids of the last user turn of each prompt, or as they stand there, where they are not too many."""

    def ids(row: dict[str, Any]) -> list[int]:
        if "input_ids" in row:
            return list(row["input_ids"])
        chat = row["prompt"][-1:]
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])

    encoded = [ids(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return [ids for ids in encoded if len(ids) <= limit_tokens]


def reward_arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of one timed training of a reward model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--pairs", type=Path, required=True, help='JSON lines {"prompt", "chosen", "rejected"}, each messages')
    parser.add_argument("--k", type=int, default=2, help="completions of a ranking; beyond 2 they are taken from other prompts")
    parser.add_argument("--rankings", type=int, default=64)
    parser.add_argument("--batch-rankings", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def rankings_of(file: Path, k: int, count: int, tokenizer: Any, limit_tokens: int) -> list[tuple[list[dict[str, str]], list[str]]]:
    """`count` prompts (their last user turn) with k completions, best first, of which all fit in `limit_tokens`."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row[side][-1]["content"] for row in rows for side in ("chosen", "rejected")]
    found: list[tuple[list[dict[str, str]], list[str]]] = []
    for number, row in enumerate(rows):
        prompt, own = row["prompt"][-1:], [row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
        completions = own + [texts[(7919 * (number + 1) + 104729 * i) % len(texts)] for i in range(k - 2)]
        if len(set(completions)) == k and _longest(tokenizer, prompt, completions) < limit_tokens:
            found.append((prompt, completions))
        if len(found) == count:
            break
    return found


def divided_pairs(file: Path, tokenizer: Any, limit_tokens: int, test: int, train: int) -> tuple[list[Any], list[Any]]:
    """(train, test) pairs as (prompt, [chosen, rejected]), the prompt being its last user turn; no prompt is on both sides.

    Pairs that do not fit are left out. The order is that of the prompts' digests.
    """
    found: dict[str, list[tuple[list[dict[str, str]], list[str]]]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        prompt, completions = row["prompt"][-1:], [row[side][-1]["content"] for side in ("chosen", "rejected")]
        if completions[0] != completions[1] and _longest(tokenizer, prompt, completions) < limit_tokens:
            key = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
            found.setdefault(key, []).append((prompt, completions))
    groups = [found[key] for key in sorted(found)]
    held_out: list[Any] = []
    while len(held_out) < test:
        held_out += groups.pop(0)
    learned = [pair for group in groups for pair in group]
    if len(learned) < train:
        raise SystemExit(f"{file} has {len(learned)} pairs of at most {limit_tokens} tokens to learn from, not {train}")
    return learned[:train], held_out


def _longest(tokenizer: Any, prompt: list[dict[str, str]], completions: list[str]) -> int:
    """Tokens of the longest chat of the prompt with one of the completions."""
    chats = [[*prompt, {"role": "assistant", "content": text}] for text in completions]
    return max(len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]) for chat in chats)
