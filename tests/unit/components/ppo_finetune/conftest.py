"""Folders of an SFT policy, a reward model and a judge of a few thousand parameters, in full and with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf.adapters import add_adapter, merge_adapter_into, save_adapter
from components.rlhf.models import new_scorer, save_model
from components.rlhf.scratch_model import new_model, train_tokenizer

TEXTS = ["the cat sat on the mat .", "a dog ran to the red house .", "please restart the router now .", "no , thank you ."]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _scorer(folder: Path, policy: Path, tokenizer: Any, seed: int, lora: bool, layers: int) -> None:
    model = new_scorer(policy, seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.score_mean, model.config.score_deviation = 0.1 * seed, 0.5
    if lora:
        carrier = new_scorer(policy, seed)
        add_adapter(carrier, "reward", rank=2, alpha=4, seed=seed, layers=layers)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in carrier.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_adapter(carrier, "reward", folder / "adapter", rank=2, alpha=4, layers=layers)
        merge_adapter_into(model, carrier, "reward")
    save_model(model, tokenizer, folder)


def make_folders(root: Path, lora: bool, layers: int = 0) -> dict[str, Path]:
    tokenizer = train_tokenizer(TEXTS, vocabulary=320, context_tokens=64)
    model = new_model(tokenizer, layers=2, hidden=16, heads=2, context_tokens=64, seed=0)
    with torch.no_grad():  # larger than Llama's own, so that the distributions are not uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
        model.get_input_embeddings().weight.mul_(2.0)
    folders = {name: root / name for name in ("sft", "reward", "judge")}
    save_model(model, tokenizer, folders["sft"])
    _scorer(folders["reward"], folders["sft"], tokenizer, 1, lora, layers)
    _scorer(folders["judge"], folders["sft"], tokenizer, 2, lora, layers)
    return folders


@pytest.fixture(scope="session", params=[(False, 0), (True, 0), (True, 1)], ids=["full", "lora", "trunk"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`sft`, `reward`, `judge`; whether they share a base, how many of its two layers carry adapters (0: both), and `adapter`,
    which is what `load_roles` and the configuration call the policy's.
    """
    lora, layers = request.param
    adapter = {"lora_rank": 2 if lora else 0, "lora_alpha": 4, "lora_layers": layers}
    return {**make_folders(tmp_path_factory.mktemp("models"), lora, layers), "lora": lora, "layers": layers, "adapter": adapter}
