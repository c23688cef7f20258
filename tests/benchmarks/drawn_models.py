"""Models of the profiles' shapes whose weights are drawn on the device, and token ids drawn at random: no file is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from components.dpo_finetune import stage as dpo
from components.ppo_finetune import roles as ppo_roles
from components.rlhf import reward_training
from components.rlhf.adapters import ADAPTER_FOLDER, save_adapter
from components.rlhf.attention import use_short_rows
from components.rlhf.models import HEAD, device, dtype_of, init_head
from components.rlhf.rankings import EncodedRanking
from components.rlhf.records import Ranking
from components.rlhf.scratch_model import train_tokenizer
from pipelines.capacity.shapes import SHAPES, Shape, llama_config

PROFILES = Path(__file__).parents[2] / "pipelines" / "profiles"
CONTEXT_TOKENS = 2048
RANKED = 4  # completions of a ranking
CASES = {"smollm2": "SmolLM2-135M", "llm-1b": "Llama-3.2-1B", "llm-8b": "Llama-3.1-8B", "tiny": "tiny"}
TINY = Shape(64, 128, 2, 4, 2, 512, True, 0)


class Case(NamedTuple):
    """A shape with its profile's settings."""

    name: str
    config: PretrainedConfig
    settings: dict[str, dict[str, Any]]
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    matrix_tflops: float  # that a large product in bfloat16 reaches here


def make_case(name: str, folder: Path, matrix_tflops: float) -> Case:
    shape = TINY if name == "tiny" else SHAPES[CASES[name]]
    profile = "smollm2" if name == "tiny" else name
    settings = yaml.safe_load((PROFILES / f"{profile}.yaml").read_text(encoding="utf-8"))
    if name == "tiny":
        for stage in ("train_reward_model", "ppo_finetune", "dpo_finetune"):
            settings[stage]["lora_layers"] = 1
    tokenizer = train_tokenizer(["some words for a tokenizer"], 300, CONTEXT_TOKENS)
    config = llama_config(shape, CONTEXT_TOKENS)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    folder = folder / name
    folder.mkdir()
    config.save_pretrained(folder)
    return Case(name, config, settings, folder, tokenizer, matrix_tflops)


def drawn(auto_class: Any, config: PretrainedConfig) -> Any:
    """A model in bfloat16 whose weights are drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = auto_class.from_config(config, dtype=dtype_of("bfloat16")).eval()
    if device().type == "cpu":
        use_short_rows(model)
    return model


@contextmanager
def weights_are_drawn(case: Case) -> Iterator[None]:
    """The stages' loaders of models give drawn ones; everything else of the stages is theirs."""

    def policy(*_: Any) -> Any:
        return drawn(AutoModelForCausalLM, case.config), case.tokenizer

    def scorer(*_: Any) -> Any:
        config = type(case.config).from_dict({**case.config.to_dict(), "num_labels": 1})
        model = drawn(AutoModelForSequenceClassification, config)
        init_head(model.score.float(), 0)
        return model

    def frozen_scorer(*_: Any) -> Any:
        return scorer().requires_grad_(False), case.tokenizer

    with (
        mock.patch.object(ppo_roles, "load_policy", policy),
        mock.patch.object(ppo_roles, "load_scorer", frozen_scorer),
        mock.patch.object(reward_training, "new_scorer", scorer),
        mock.patch.object(dpo, "load_policy", policy),
    ):
        yield


def ids(case: Case, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, case.config.vocab_size - 10, (length,), generator=generator).tolist()


def rankings(case: Case, count: int, max_tokens: int) -> list[EncodedRanking]:
    """Rankings of four completions: half of the limit is the prompt's, and the rest a completion's."""
    prompt, completion = max_tokens // 2, max_tokens - max_tokens // 2
    empty: dict[str, Any] = dict.fromkeys(("source", "collected_at", "confidence", "policies", "criterion"))
    record = Ranking(ranking_id="", prompt=[], completions=[""] * RANKED, ranks=[1, 2, 3, 4], rater_id="", split="train", **empty)
    return [
        EncodedRanking(record, [ids(case, prompt, n)] * RANKED, [ids(case, completion, n * RANKED + k) for k in range(RANKED)])
        for n in range(count)
    ]


def save_scorer_folder(case: Case, model: Any, head: torch.nn.Module, config: Any) -> None:
    """What PPO reads of a reward model beside its backbone: head and adapter."""
    save_file({HEAD: head.weight.detach().cpu()}, case.folder / "model.safetensors")
    folder = case.folder / ADAPTER_FOLDER
    save_adapter(model, reward_training.ADAPTER, folder, config.lora_rank, config.lora_alpha, config.lora_layers)
