"""What share of held-out pairs reward models get right after so many pairs of real preferences, as one JSON line for each size.

    python -m tests.benchmarks.preferences --model FOLDER --pairs FILE --method lora --train 150 300 600
    python -m tests.benchmarks.preferences --model FOLDER --pairs FILE --method probe --train 150 300 600
    python -m tests.benchmarks.preferences --model FOLDER --pairs FILE --method saved --folder FOLDER --train 600

`lora` and `full` train with the stage's own loss and optimiser, each size from the start, so that its schedule ends there. `probe`
is a linear Bradley-Terry head on the frozen model's features, of the layer that does best on a fifth of the pairs it learns from: a
reward model below it is not trained well. `saved` measures a model that another library trained. All are measured on the same held-
out pairs, and no prompt is on both sides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.models import Role, load_policy, load_scorer, scorer_role
from components.rlhf.optimisation import Optimiser, data_order
from components.rlhf.rankings import EncodedRanking, encode_rankings
from components.rlhf.reward_training import accumulate, new_role, scores_of
from components.rlhf.statistics import wilson_interval
from components.rlhf.tokens import length_batches, right_pad
from components.train_reward_model.stage import Config
from tests.benchmarks.ours_reward import as_rankings
from tests.benchmarks.work import divided_pairs

MICRO_BATCH_TOKENS = 1024
RANK = 16


def trained(
    a: argparse.Namespace, train: list[EncodedRanking], rate: float, tokenizer: PreTrainedTokenizerBase
) -> tuple[Role, float]:
    """The role after so many epochs at a learning rate, and the seconds that took."""
    adapter = {"lora_rank": RANK, "lora_alpha": 2 * RANK, "lora_layers": a.lora_layers, "precision": "bfloat16"}
    config = Config(
        batch_rankings=8,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        **(adapter if a.method == "lora" else {}),
    )
    _, role = new_role(config, a.seed, a.model, tokenizer)
    draws = data_order(len(train), a.epochs * len(train), a.seed)
    order = [draws[first : first + config.batch_rankings] for first in range(0, len(draws), config.batch_rankings)]
    optimiser = Optimiser(
        role.trainable, learning_rate=rate, steps=len(order), warmup_fraction=0.05, weight_decay=config.weight_decay
    )
    started = time.perf_counter()
    for rows in order:
        accumulate(config, role, [train[i] for i in rows], tokenizer.pad_token_id)
        optimiser.step()
    return role, time.perf_counter() - started


@torch.no_grad()
def features(model: Any, rankings: list[EncodedRanking], pad_id: int) -> np.ndarray:
    """Chosen minus rejected, of every layer: the last token's hidden state and the completion's mean, [N, L, 2 D]."""
    rows = [(p, c) for each in rankings for p, c in zip(each.prompts, each.completions, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in length_batches([len(p) + len(c) for p, c in rows], MICRO_BATCH_TOKENS):
        batch = right_pad([rows[i][0] for i in group], [rows[i][1] for i in group], pad_id)
        layers = model.base_model(input_ids=batch.ids_BT, use_cache=False, output_hidden_states=True).hidden_states[1:]
        for number, i in enumerate(group):
            own = torch.stack([hidden[number][batch.completion_mask_BT[number]].float() for hidden in layers])  # [L, T, D]
            found[i] = torch.cat([own[:, -1], own.mean(1)], -1)
    return torch.stack([found[i] - found[i + 1] for i in range(0, len(rows), 2)]).numpy()


def probe(train_NLF: np.ndarray, test_NLF: np.ndarray) -> np.ndarray:
    """Leads [N] of the chosen completion over the rejected on the test pairs."""
    own = len(train_NLF) * 4 // 5

    def fitted(rows: slice, layer: int, strength: float) -> Any:
        x = train_NLF[rows, layer] / train_NLF[rows, layer].std(0)
        return LogisticRegression(C=strength, fit_intercept=False, max_iter=500).fit(
            np.concatenate([x, -x]), np.repeat([1, 0], len(x))
        )

    def right(layer: int, strength: float) -> float:
        model, scale = fitted(slice(0, own), layer, strength), train_NLF[:own, layer].std(0)
        return float((model.decision_function(train_NLF[own:, layer] / scale) > 0).mean())

    choices = [(layer, strength) for layer in range(train_NLF.shape[1]) for strength in (1e-4, 1e-3, 1e-2)]
    layer, strength = max(choices, key=lambda choice: right(*choice))
    leads: np.ndarray = fitted(slice(None), layer, strength).decision_function(test_NLF[:, layer] / train_NLF[:, layer].std(0))
    return leads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--pairs", type=Path, required=True, help='JSON lines {"prompt", "chosen", "rejected"}, each messages')
    parser.add_argument("--method", choices=["lora", "full", "probe", "saved"], required=True)
    parser.add_argument("--folder", type=Path, help="of the saved reward model")
    parser.add_argument("--train", type=int, nargs="+", required=True, help="pairs to learn from")
    parser.add_argument("--test", type=int, default=300, help="held-out pairs")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer pairs are left out")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3], help="of lora and full")
    parser.add_argument("--epochs", type=int, default=1, help="of lora and full")
    parser.add_argument("--lora-layers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model, tokenizer = load_policy(a.model, "bfloat16")
    pad_id = tokenizer.pad_token_id
    train, test = (
        encode_rankings(tokenizer, as_rankings(pairs), 2 * a.max_tokens).rankings
        for pairs in divided_pairs(a.pairs, tokenizer, a.max_tokens, a.test, max(a.train))
    )
    if a.method == "probe":
        train_NLF, test_NLF = features(model, train, pad_id), features(model, test, pad_id)
    del model
    rates = a.learning_rates if a.method in ("lora", "full") else [0.0]
    for size, rate in itertools.product(a.train, rates):
        seconds = 0.0
        if a.method == "probe":
            leads = probe(train_NLF[:size], test_NLF)
        else:
            if a.method == "saved":
                role = scorer_role(load_scorer(a.folder)[0])
            else:
                role, seconds = trained(a, train[:size], rate, tokenizer)
            leads = np.array([chosen - rejected for chosen, rejected in scores_of(role, test, pad_id, MICRO_BATCH_TOKENS)])
        accuracy = wilson_interval(float((leads > 0).sum()), len(leads))
        numbers = {key: round(value, 3) for key, value in accuracy._asdict().items()}
        settings = {"learning_rate": rate, "lora_layers": a.lora_layers, "epochs": a.epochs} if rate else {}
        print(json.dumps({"method": a.method, "pairs": size, **settings, **numbers, "seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
