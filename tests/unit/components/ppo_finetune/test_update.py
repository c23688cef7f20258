"""One PPO update on tiny models, in full and with adapters on one base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.ppo_finetune.engine import roll_out
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.roles import POLICY, Roles, load_roles
from components.ppo_finetune.stage import Config
from components.ppo_finetune.update import Experience, look_at, optimise, statistics
from components.rlhf.adapters import save_policy
from components.rlhf.models import Precision, load_scorer
from components.rlhf.optimisation import weights_of
from components.rlhf.reward import Centring, score
from components.rlhf.tokens import encode_prompt

PROMPTS = ["the cat", "a dog ran", "restart the router", "no", "thank you", "the red house"]


def _roles(folders: dict[str, Any], precision: Precision = "float32", **changes: Any) -> Roles:
    adapter = {**folders["adapter"], **(changes if folders["lora"] else {})}
    return load_roles(folders["sft"], folders["reward"], folders["judge"], precision=precision, seed=0, **adapter)


def _config(**changes: Any) -> Config:
    return Config(**{"updates": 4, "batch_prompts": 6, "max_new_tokens": 10, "epochs": 2, "learning_rate": 1e-2, **changes})


def _prompts(roles: Roles) -> list[list[int]]:
    return [encode_prompt(roles.tokenizer, [{"role": "user", "content": text}], 40)[0] for text in PROMPTS]


def _experience(config: Config, roles: Roles, seed: int = 0) -> Experience:
    return look_at(config, roles, roll_out(config, roles, _prompts(roles), torch.Generator().manual_seed(seed)))


def test_line_33_before_the_first_update_the_ratio_is_one_and_kl_is_zero(folders: dict[str, Any]) -> None:
    config, roles = _config(), _roles(folders)
    experience = _experience(config, roles)
    numbers = statistics(experience)
    assert numbers["kl_reference"] == pytest.approx(0.0, abs=1e-4)
    assert numbers["logprob_mismatch"] < 1e-3
    progress = Progress(_config(epochs=1, learning_rate=1e-9), roles)
    first = optimise(_config(epochs=1), roles, progress.optimisers, experience, 0.1, torch.Generator(), critic_only=False)
    assert first["kl_old"] == pytest.approx(0.0, abs=1e-6)
    assert first["clip_fraction"] == 0.0
    assert first["policy_loss"] == pytest.approx(0.0, abs=1e-4)  # whitened advantages have mean 0


def test_line_21_only_policy_and_value_change(folders: dict[str, Any]) -> None:
    config, roles = _config(), _roles(folders)
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    frozen = (roles.reference, roles.reward, roles.judge)
    before = [role.hidden(ids).clone() for role in frozen]
    policy, value = (roles.policy.hidden(ids).clone(), roles.value.hidden(ids).clone())
    progress = Progress(config, roles)
    for _ in range(2):
        optimise(config, roles, progress.optimisers, _experience(config, roles), 0.1, torch.Generator(), critic_only=False)
    for role, hidden in zip(frozen, before, strict=True):
        torch.testing.assert_close(role.hidden(ids), hidden)
        assert role.trainable == []
    assert (roles.policy.hidden(ids) - policy).abs().max() > 1e-3
    assert (roles.value.hidden(ids) - value).abs().max() > 1e-3
    assert not any(module.training for module in roles.model.modules())


def test_beyond_the_kl_bound_only_the_value_model_goes_on(folders: dict[str, Any]) -> None:
    def after(epochs: int, bound: float) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, float]]:
        config, roles = _config(epochs=epochs, max_kl_old=bound), _roles(folders)
        progress = Progress(_config(warmup_fraction=0), roles)
        numbers = optimise(
            config, roles, progress.optimisers, _experience(config, roles), 0.1, torch.Generator(), critic_only=False
        )
        return weights_of(roles.policy.trainable), weights_of(roles.value.trainable), numbers

    one_policy, one_value, _ = after(epochs=1, bound=0.0)
    policy, value, numbers = after(epochs=3, bound=1e-7)  # the first pass is at KL 0, the second is not
    assert numbers["policy_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(one_policy, policy, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one_value, value, strict=True))
    assert after(epochs=3, bound=100.0)[2]["policy_steps"] == 3


def test_the_value_model_makes_its_own_number_of_passes(folders: dict[str, Any]) -> None:
    def after(epochs: int, value_epochs: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        config, roles = _config(epochs=epochs, value_epochs=value_epochs), _roles(folders)
        progress = Progress(_config(warmup_fraction=0), roles)
        optimise(config, roles, progress.optimisers, _experience(config, roles), 0.1, torch.Generator(), critic_only=False)
        return weights_of(roles.policy.trainable), weights_of(roles.value.trainable)

    def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    policy, value = after(epochs=3, value_epochs=1)
    one_policy, one_value = after(epochs=1, value_epochs=0)
    three_policy, three_value = after(epochs=3, value_epochs=0)
    assert equal(value, one_value)
    assert not equal(value, three_value)
    assert equal(policy, three_policy)
    assert not equal(policy, one_policy)
    with pytest.raises(ValueError, match="value_epochs 3 is more than epochs 2"):
        _config(value_epochs=3)


def test_several_completions_of_a_prompt_share_it_and_differ(folders: dict[str, Any]) -> None:
    config, roles = _config(samples_per_prompt=3), _roles(folders)
    experience = _experience(config, roles)
    assert [c.prompt_ids for c in experience.completions] == [p for p in _prompts(roles) for _ in range(3)]
    assert len({c.text for c in experience.completions}) > len(PROMPTS)
    assert statistics(experience)["logprob_mismatch"] < 1e-3  # a fresh forward pass over whole rows agrees with the shared prompt
    numbers = optimise(config, roles, Progress(config, roles).optimisers, experience, 0.1, torch.Generator(), critic_only=False)
    assert numbers["policy_steps"] == 2


def test_line_30_critic_warm_up_leaves_the_policy_alone(folders: dict[str, Any]) -> None:
    config, roles = _config(), _roles(folders)
    before = [w.clone() for w in weights_of(roles.policy.trainable)]
    value = [w.clone() for w in weights_of(roles.value.trainable)]
    progress = Progress(config, roles)
    optimise(config, roles, progress.optimisers, _experience(config, roles), 0.1, torch.Generator(), critic_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(roles.policy.trainable), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(value, weights_of(roles.value.trainable), strict=True))


def test_line_28_micro_batches_change_nothing(folders: dict[str, Any]) -> None:
    results = []
    for micro_batch_tokens in (100_000, 64):
        config, roles = _config(micro_batch_tokens=micro_batch_tokens, learning_rate=1e-3), _roles(folders)
        experience = _experience(config, roles)
        numbers = optimise(
            config, roles, Progress(config, roles).optimisers, experience, 0.1, torch.Generator().manual_seed(1), critic_only=False
        )
        results.append((numbers, [w.clone() for w in weights_of(roles.policy.trainable)], experience))
    (one, weights_one, a), (other, weights_other, b) = results
    torch.testing.assert_close(a.logprobs_old_BT, b.logprobs_old_BT, atol=1e-4, rtol=1e-4)
    assert one == pytest.approx(other, abs=1e-3)
    for w, v in zip(weights_one, weights_other, strict=True):
        torch.testing.assert_close(w, v, atol=2e-4, rtol=1e-3)


def test_line_19_a_missing_eos_replaces_the_score(folders: dict[str, Any]) -> None:
    config, roles = _config(no_eos_score=-7.5, max_new_tokens=3), _roles(folders)
    experience = _experience(config, roles)
    ended = torch.tensor([c.ended for c in experience.completions])
    assert not ended.all()
    assert (experience.scores_B[~ended] == -7.5).all()
    assert (experience.judge_B[~ended] == -7.5).all()


def test_mistake_penalty_half_an_answer_is_worth_the_same_whatever_the_reward_model_says_of_it(folders: dict[str, Any]) -> None:
    """One library takes a penalty off the score instead, so that half an answer that is liked beats a whole one that is not."""
    roles = _roles(folders)
    completions = roll_out(_config(max_new_tokens=3), roles, _prompts(roles), torch.Generator().manual_seed(0))
    liked = look_at(_config(cut_completions="scored"), roles, completions).scores_B
    paid = look_at(_config(no_eos_score=-2.0), roles, completions).scores_B
    cut = torch.tensor([not c.ended for c in completions])
    assert cut.sum() > 1
    assert liked[cut].std() > 0.01, "the reward model tells them apart"
    assert set(paid[cut].tolist()) == {-2.0}


def test_a_cut_completion_can_be_scored_as_if_it_ended_there(folders: dict[str, Any]) -> None:
    config, roles = _config(cut_completions="scored", max_new_tokens=3), _roles(folders)
    experience = _experience(config, roles)
    model, _ = load_scorer(folders["reward"])
    assert not all(c.ended for c in experience.completions)
    for completion, mine in zip(experience.completions, experience.scores_B, strict=True):
        eos = [] if completion.ended else [roles.tokenizer.eos_token_id]
        raw = model(torch.tensor([[*completion.prompt_ids, *completion.token_ids, *eos]])).logits.squeeze()
        assert mine.item() == pytest.approx(Centring.of(model.config)(raw).item(), abs=1e-3)
    assert experience.batch.completion_mask_BT.sum() == sum(len(c.token_ids) for c in experience.completions), (
        "nobody sampled that EOS"
    )


def test_line_35_reward_model_and_judge_score_the_same_samples_as_their_folders_do(folders: dict[str, Any]) -> None:
    """An adapter on the shared base scores what the merged folder scores in plain transformers of the same samples."""
    config, roles = _config(), _roles(folders)
    completions = roll_out(config, roles, _prompts(roles), torch.Generator().manual_seed(0))
    experience = look_at(
        config, roles, [c._replace(token_ids=[*c.token_ids[:4], 1], ended=True, logprobs=c.logprobs[:5]) for c in completions]
    )
    for name, scores in (("reward", experience.scores_B), ("judge", experience.judge_B)):
        model, _ = load_scorer(folders[name])
        for completion, mine in zip(experience.completions, scores, strict=True):
            ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
            raw = model(ids).logits.squeeze()
            assert mine.item() == pytest.approx(Centring.of(model.config)(raw).item(), abs=1e-3)


def test_line_30_the_value_model_starts_from_the_reward_model(folders: dict[str, Any]) -> None:
    """Value of the token after EOS' predecessor = what the reward model would say there, centred."""
    roles = _roles(folders)
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    raw = roles.reward.head(roles.reward.hidden(ids))
    value = roles.value.head(roles.value.hidden(ids))
    torch.testing.assert_close(value, roles.reward_centring(raw), atol=1e-4, rtol=1e-4)


def test_the_saved_policy_is_the_trained_one_in_plain_transformers(folders: dict[str, Any], tmp_path: Any) -> None:
    config, roles = _config(), _roles(folders)
    progress = Progress(config, roles)
    optimise(config, roles, progress.optimisers, _experience(config, roles), 0.1, torch.Generator(), critic_only=False)
    adapter = POLICY if folders["lora"] else ""
    save_policy(roles.model, roles.tokenizer, tmp_path / "policy", base=folders["sft"], adapter=adapter)
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    expected = roles.policy.head(roles.policy.hidden(ids))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_every_role_stays_near_float32_and_is_stepped_in_float32(folders: dict[str, Any]) -> None:
    config, roles, near = _config(cut_completions="scored"), _roles(folders), _roles(folders, "bfloat16")
    completions = roll_out(config, roles, _prompts(roles), torch.Generator().manual_seed(0))
    one, other = look_at(config, roles, completions), look_at(config, near, completions)
    for name in ("logprobs_old_BT", "logprobs_reference_BT", "values_old_BT", "scores_B", "judge_B"):
        exact, rounded = getattr(one, name), getattr(other, name)
        assert rounded.dtype == torch.float32, name
        assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean(), name
        assert not torch.equal(exact, rounded), name
    progress = Progress(_config(learning_rate=1e-5, warmup_fraction=0), near)
    before = [weight.detach().clone() for weight in near.policy.trainable]
    for _ in range(3):
        optimise(config, near, progress.optimisers, other, 0.1, torch.Generator(), critic_only=False)
    copies = progress.optimisers.policy.state()["copies"]
    assert len(copies) == (0 if folders["lora"] else len(before)), "adapters are float32 already"
    for copy, old, new in zip(copies, before, near.policy.trainable, strict=False):
        assert 1e-6 < (copy - old).abs().max() < 1e-3, "too small a step for bfloat16"
        assert torch.equal(copy.bfloat16(), new)
        assert new.grad is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_learns_what_is_rewarded(folders: dict[str, Any], precision: Precision) -> None:
    """Rewarded for first tokens whose output embedding points one way, and for nothing else, it comes to give those."""
    config = _config(updates=40, max_new_tokens=1, learning_rate=2e-2, value_learning_rate=2e-2)
    roles = _roles(folders, precision, lora_rank=8)
    good_V = roles.model.get_output_embeddings().weight.detach()[:, 0] > 0
    progress = Progress(config, roles)
    sampling = torch.Generator().manual_seed(0)
    good = []
    for _ in range(config.updates):
        experience = look_at(config, roles, roll_out(config, roles, _prompts(roles) * 6, sampling))
        good_B = torch.tensor([bool(good_V[c.token_ids[0]]) for c in experience.completions])
        good.append(good_B.float().mean().item())
        scores_B = 2.0 * good_B - 1.0
        optimise(
            config, roles, progress.optimisers, experience._replace(scores_B=scores_B), 0.0, torch.Generator(), critic_only=False
        )
    assert sum(good[:2]) / 2 < 0.75
    assert sum(good[-3:]) / 3 > sum(good[:2]) / 2 + 0.15


def test_line_03_a_text_is_scored_as_its_tokens_and_eos(folders: dict[str, Any]) -> None:
    model, tokenizer = load_scorer(folders["reward"])
    prompt = [{"role": "user", "content": "the cat"}]
    ids = [*encode_prompt(tokenizer, prompt, 40)[0], *tokenizer("no")["input_ids"], tokenizer.eos_token_id]
    raw = model(torch.tensor([ids])).logits.squeeze()
    by_text = score(model, tokenizer, [prompt], ["no"], batch_size=1)[0]
    assert by_text.item() == pytest.approx(Centring.of(model.config)(raw).item(), abs=1e-4)


def test_a_shared_trunk_changes_no_bit_of_an_update(folders: dict[str, Any]) -> None:
    if not folders["layers"]:
        pytest.skip("these roles have layers of their own from the first on")
    results = []
    for shared in (True, False):
        config, roles = _config(micro_batch_tokens=64, cut_completions="scored"), _roles(folders)
        assert roles.trunk is not None
        experience = _experience(config, roles if shared else roles._replace(trunk=None))
        assert (experience.batch.trunk_BTD is not None) == shared
        numbers = optimise(
            config, roles, Progress(config, roles).optimisers, experience, 0.1, torch.Generator().manual_seed(1), critic_only=False
        )
        weights = [w.clone() for role in (roles.policy, roles.value) for w in weights_of(role.trainable)]
        results.append((numbers, weights, statistics(experience)))
    (numbers, weights, logged), (numbers_whole, weights_whole, logged_whole) = results
    assert (numbers, logged) == (numbers_whole, logged_whole)
    assert all(torch.equal(one, other) for one, other in zip(weights, weights_whole, strict=True))
