"""Loading, padding tokens, adapters, and plain folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf import models
from components.rlhf.adapters import adapter_role, add_adapter, copy_adapter, load_adapter, merge_adapter_into, save_adapter
from components.rlhf.attention import SHORT_ROWS
from components.rlhf.models import load_policy, new_scorer, policy_role, save_model, scorer_role

IDS = torch.tensor([[5, 9, 12, 7, 30]])
MASK = torch.ones_like(IDS)


@pytest.fixture
def folder(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    save_model(model, tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


def _disturb(model: Any, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_saved_policy_is_a_plain_folder_without_pickle(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pkl", ".pth"))}


def test_greedy_answers_are_the_same_in_plain_transformers(folder: Path) -> None:
    ours, tokenizer = load_policy(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]])
    a = ours.generate(ids, do_sample=False, max_new_tokens=8)
    b = plain.generate(ids, do_sample=False, max_new_tokens=8)
    assert a.tolist() == b.tolist()
    assert tokenizer.chat_template


@pytest.mark.parametrize("pad", ["<|end|>", None, "<|user|>"], ids=["eos", "none", "another-end"])
def test_line_01_a_pad_token_that_is_missing_or_an_end_is_replaced(
    pad: str | None, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Where padding is an end of the answer, masking the padding masks the end, and the model cannot learn to stop."""
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    save_model(model, tokenizer, tmp_path)
    broken = AutoTokenizer.from_pretrained(tmp_path)
    broken.pad_token = pad
    broken.save_pretrained(tmp_path)
    loaded, fixed = load_policy(tmp_path)
    assert fixed.pad_token_id is not None
    assert fixed.pad_token_id not in model.generation_config.eos_token_id
    assert loaded.config.pad_token_id == fixed.pad_token_id
    assert loaded.get_input_embeddings().num_embeddings >= len(fixed)


def test_a_model_that_lies_in_the_hosts_memory_attends_as_its_device_will(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From there divided layers go to an accelerator, where matrix products of all T^2 scores are slow and large."""
    here = load_policy(folder, place=torch.device("cpu"))[0]
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    elsewhere = load_policy(folder, place=torch.device("cpu"))[0]
    assert [each.config._attn_implementation for each in (here, elsewhere)] == [SHORT_ROWS, "sdpa"]


def test_no_eos_or_no_template_or_scaled_logits_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_policy(tmp_path)
    save_model(model, tokenizer, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"logit_scale": 0.5,', 1))
    with pytest.raises(ValueError, match="logit_scale"):
        load_policy(tmp_path)


def test_line_21_a_new_adapter_changes_nothing_and_a_disturbed_one_only_its_own_role(folder: Path) -> None:
    """Reference = base with the adapter off; policy, reward and value do not disturb each other."""
    model, _ = load_policy(folder)
    plain = policy_role(load_policy(folder)[0]).hidden(IDS)
    head = model.get_output_embeddings()
    for number, name in enumerate(("policy", "value")):
        add_adapter(model, name, rank=2, alpha=4, seed=number)
    policy = adapter_role(model, "policy", head, trainable=True, head_trainable=False)
    reference = adapter_role(model, "", head, trainable=False, head_trainable=False)
    value = adapter_role(model, "value", head, trainable=True, head_trainable=False)
    for role in (policy, reference, value):
        torch.testing.assert_close(role.hidden(IDS), plain)
    _disturb(model, "policy", seed=3)
    assert (policy.hidden(IDS) - plain).abs().max() > 1e-3
    torch.testing.assert_close(reference.hidden(IDS), plain)
    torch.testing.assert_close(value.hidden(IDS), plain)


def test_gradients_of_two_adapters_on_one_base_do_not_mix(folder: Path) -> None:
    model, _ = load_policy(folder)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    add_adapter(model, "policy", rank=2, alpha=4, seed=0)
    add_adapter(model, "value", rank=2, alpha=4, seed=1)
    for name in ("policy", "value"):
        _disturb(model, name, seed=5)
    roles = [adapter_role(model, name, head, trainable=True, head_trainable=False) for name in ("policy", "value")]
    for role in roles:
        role.hidden(IDS).sum().backward()
    gradients = [[p.grad.clone() for p in role.trainable] for role in roles]
    assert all(g.abs().sum() > 0 for each in gradients for g in each)
    assert model.model.embed_tokens.weight.grad is None
    for role in roles:
        for parameter in role.trainable:
            parameter.grad = None
    roles[0].hidden(IDS).sum().backward()
    for parameter, gradient in zip(roles[0].trainable, gradients[0], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for p in roles[1].trainable)


def test_a_merged_adapter_is_the_adapter(folder: Path) -> None:
    model, _ = load_policy(folder)
    add_adapter(model, "policy", rank=2, alpha=4, seed=0)
    _disturb(model, "policy", seed=1)
    role = adapter_role(model, "policy", model.get_output_embeddings(), trainable=True, head_trainable=False)
    plain, _ = load_policy(folder)
    merge_adapter_into(plain, model, "policy")
    torch.testing.assert_close(policy_role(plain).hidden(IDS), role.hidden(IDS), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_reward_model_fits_the_policy_it_started_from(folder: Path, tmp_path: Path) -> None:
    scorer = new_scorer(folder, seed=0)
    add_adapter(scorer, "reward", rank=3, alpha=6, seed=0)
    _disturb(scorer, "reward", seed=2)
    trained = adapter_role(scorer, "reward", scorer.score, trainable=True, head_trainable=True).hidden(IDS)
    save_adapter(scorer, "reward", tmp_path / "adapter", rank=3, alpha=6)
    model, _ = load_policy(folder)
    assert load_adapter(model, "judge", tmp_path / "adapter") == (3, 6, 0)
    add_adapter(model, "value", rank=3, alpha=6, seed=9)
    copy_adapter(model, "judge", "value")
    for name in ("judge", "value"):
        role = adapter_role(model, name, scorer.score, trainable=False, head_trainable=False)
        torch.testing.assert_close(role.hidden(IDS), trained, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    from components.rlhf.scratch_model import new_model

    other = new_model(tokenizer, layers=2, hidden=24, heads=2, context_tokens=64, seed=0)
    add_adapter(other, "reward", rank=2, alpha=4, seed=0)
    save_adapter(other, "reward", tmp_path / "adapter", rank=2, alpha=4)
    model, _ = load_policy(folder)
    with pytest.raises(ValueError, match="the adapter has no weight"):
        load_adapter(model, "judge", tmp_path / "adapter")


def test_trainable_is_everything_or_nothing(folder: Path) -> None:
    model, _ = load_policy(folder)
    assert len(policy_role(model, trainable=True).trainable) == len(list(model.parameters()))
    assert policy_role(model).trainable == []
    assert scorer_role(new_scorer(folder, 0)).trainable == []
