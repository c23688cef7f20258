"""What is written for vLLM is the policy, and what is asked of it is what the torch sampler does.

There is no vLLM here: the other end of the line is in this process and only keeps what it is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from components.rlhf.adapters import adapter_role, add_adapter, save_peft_adapter
from components.rlhf.models import load_policy, save_model
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.vllm_sampler import VllmSampler, save_untied, start_request
from components.services.exits import DoNotRetry

IDS = torch.tensor([[5, 40, 80, 120, 250]])
PROMPTS = [[7, 8], [9]]


class Kept:
    """The other end of the line."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.folders: list[list[str]] = []

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        self.requests.append(dict(request))
        self.folders.append(sorted(each.name for each in Path(request["adapter"] or request["weights"]).parent.iterdir()))
        return {"answers": [{"ids": [20 + len(prompt), 1], "logprobs": [-0.1, -0.2]} for prompt in request["prompts"]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["the cat sat on the mat .", "a dog ran to the red house ."], 320, 64)
    save_model(new_model(tokenizer, layers=3, hidden=16, heads=2, context_tokens=64, seed=0), tokenizer, folder)
    return folder


@pytest.mark.parametrize("layers", [0, 1, 2])
@torch.no_grad()
def test_an_adapter_is_written_as_peft_reads_it(folder: Path, tmp_path: Path, layers: int) -> None:
    model, _ = load_policy(folder)
    add_adapter(model, "policy", 4, 12, 0, layers)
    role = adapter_role(model, "policy", model.get_output_embeddings(), trainable=True, head_trainable=False)
    for parameter in role.trainable:
        parameter.add_(0.3)
    save_peft_adapter(model, "policy", tmp_path / "adapter", 4, 12, layers)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    before = plain(IDS).logits
    carried = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    expected = role.head(role.hidden(IDS))
    torch.testing.assert_close(carried(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3
    carrying = {int(name.split(".layers.")[1].split(".")[0]) for name, _ in carried.named_parameters() if "lora_" in name}
    assert carrying == set(range(3 - (layers or 3), 3))


@torch.no_grad()
def test_whole_weights_are_written_with_a_head_of_their_own(folder: Path, tmp_path: Path) -> None:
    model, _ = load_policy(folder)
    model.get_input_embeddings().weight.add_(0.05)
    save_untied(model, tmp_path / "weights")
    assert model.config.tie_word_embeddings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", attn_implementation="eager").eval()
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["policy", ""])
def test_every_rollout_gets_the_weights_anew_and_the_ones_before_are_removed(folder: Path, tmp_path: Path, adapter: str) -> None:
    model, tokenizer = load_policy(folder)
    if adapter:
        add_adapter(model, adapter, 4, 12, 0)
    line = Kept()
    sampler = VllmSampler(line, 60, model, tokenizer, adapter, (4, 12, 0), tmp_path)
    for _ in range(2):
        drawn = sampler(PROMPTS, [11, 12], max_new_tokens=6, temperature=0.7)
    assert [ids for ids, _ in drawn] == [[22, 1], [21, 1]]
    assert drawn[0][1].dtype == torch.float32
    assert drawn[0][1].tolist() == pytest.approx([-0.1, -0.2])
    assert line.folders == [["1"], ["2"]]
    first, second = line.requests
    assert (first["number"], second["number"]) == (1, 2)
    assert (second["adapter"], second["weights"]) == ((str(tmp_path / "2"), "") if adapter else ("", str(tmp_path / "2")))
    assert (second["max_new_tokens"], second["temperature"], second["prompts"]) == (6, 0.7, PROMPTS)
    assert (second["eos_id"], second["pad_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert second["seeds"] == [11, 12]


def test_vllm_is_given_room_for_the_rank_and_the_context() -> None:
    config = LlamaConfig(max_position_embeddings=100)

    def asked(rank: int, tokens: int = 80) -> dict[str, Any]:
        request = start_request(
            Path("base"),
            config,
            precision="bfloat16",
            lora_rank=rank,
            memory_fraction=0.3,
            sleeps=True,
            cpu_cache_bytes=1000,
            max_tokens=tokens,
            rows=16,
        )
        assert (request["do"], request["model"], request["sleeps"], request["cpu_cache_bytes"]) == ("start", "base", True, 1000)
        options: dict[str, Any] = request["options"]
        return options

    assert asked(0, 200) == {"dtype": "bfloat16", "max_model_len": 100, "max_num_seqs": 16, "gpu_memory_utilization": 0.3}
    assert [asked(rank)["max_lora_rank"] for rank in (1, 2, 8, 9, 100, 512)] == [1, 8, 8, 16, 128, 512]
    with pytest.raises(DoNotRetry, match="lora_rank is 513"):
        asked(513)
