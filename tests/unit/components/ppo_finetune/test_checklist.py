"""Lines of the checklist that a whole PPO update must keep: each against numbers that are worked out here, one token at a time.

One file although it is long: the lines share the update that is worked out by hand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from components.ppo_finetune.engine import roll_out
from components.ppo_finetune.progress import Progress
from components.ppo_finetune.roles import Roles, load_roles
from components.ppo_finetune.stage import Config, one_update, read_prompts
from components.ppo_finetune.update import Experience, MicroBatch, add_policy_gradient, look_at, optimise, statistics
from components.rlhf import checkpoint, ppo
from components.rlhf.optimisation import Optimiser, weights_of
from components.rlhf.records import SCHEMA
from components.rlhf.rollout import Completion
from components.rlhf.tokens import Batch, encode_prompt

PROMPTS = ["the cat", "a dog ran", "restart the router", "no", "thank you", "the red house"]
EOS = 1


def make_roles(folders: dict[str, Any]) -> Roles:
    return load_roles(folders["sft"], folders["reward"], folders["judge"], precision="float32", seed=0, **folders["adapter"])


def make_config(**changes: Any) -> Config:
    values = {"updates": 4, "batch_prompts": 6, "max_new_tokens": 10, "epochs": 1, "learning_rate": 1e-2, "warmup_fraction": 0.0}
    return Config(**{**values, **changes})


def encoded(roles: Roles) -> list[list[int]]:
    return [encode_prompt(roles.tokenizer, [{"role": "user", "content": text}], 40)[0] for text in PROMPTS]


def experienced(config: Config, roles: Roles) -> Experience:
    """Completions of lengths 1, 4, 7, 10, ..., every other one ended, so that padding and missing EOS are there."""
    drawn = roll_out(config, roles, encoded(roles), torch.Generator().manual_seed(0))
    cut = []
    for number, each in enumerate(drawn):
        ids = each.token_ids[: 1 + 3 * (number % 4)]
        if number % 2 == 0:
            ids = [*ids[:-1], EOS]
        cut.append(Completion(each.prompt_ids, ids, str(number), ids[-1] == EOS, torch.zeros(len(ids))))
    return look_at(config, roles, cut)


def learn(config: Config, roles: Roles, experience: Experience, beta: float = 0.1) -> tuple[dict[str, float], Progress]:
    progress = Progress(config, roles)
    order = torch.Generator().manual_seed(1)
    return optimise(config, roles, progress.optimisers, experience, beta, order, critic_only=False), progress


def plain_logprobs(folder: Path, completion: Completion, temperature: float) -> torch.Tensor:
    """[T, V] of a completion's tokens, by a plain forward pass over this sequence alone; padding is never an answer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*completion.prompt_ids, *completion.token_ids]])).logits[0]
    logits = logits[len(completion.prompt_ids) - 1 : -1] / temperature
    logits[:, model.config.pad_token_id] = -torch.inf
    return torch.log_softmax(logits, -1)


def rows_of(experience: Experience, values_BT: torch.Tensor) -> list[list[float]]:
    """The values on completion tokens, row by row."""
    return [row[mask].tolist() for row, mask in zip(values_BT, experience.batch.completion_mask_BT, strict=True)]


def by_hand(
    experience: Experience, beta: float, gamma: float = 1.0, lam: float = 0.95, whiten_rewards: bool = False
) -> tuple[list[float], list[float]]:
    """Whitened advantages and plain returns of all completion tokens, by the definitions."""
    old, reference = (rows_of(experience, each) for each in (experience.logprobs_old_BT, experience.logprobs_reference_BT))
    values = rows_of(experience, experience.values_old_BT)
    rewards = [[-beta * (a - b) for a, b in zip(o, r, strict=True)] for o, r in zip(old, reference, strict=True)]
    for row, score in zip(rewards, experience.scores_B.tolist(), strict=True):
        row[-1] += score
    if whiten_rewards:
        everything = [each for row in rewards for each in row]
        mean = sum(everything) / len(everything)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in everything) / len(everything))
        rewards = [[(each - mean) / deviation + mean for each in row] for row in rewards]
    advantages: list[float] = []
    returns: list[float] = []
    for row, value in zip(rewards, values, strict=True):
        after = [*value[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(row, after, value, strict=True)]
        own = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
        advantages += own
        returns += [a + v for a, v in zip(own, value, strict=True)]
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in advantages) / len(advantages))
    return [(each - mean) / deviation for each in advantages], returns


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What the two losses are given on completion tokens, as they do their work: advantages, and returns."""
    seen: dict[str, list[float]] = {"advantages": [], "returns": []}
    plain_policy, plain_value = ppo.policy_loss, ppo.value_loss

    def policy_loss(logprobs: Any, old: Any, advantages: Any, mask: Any, *rest: Any) -> Any:
        seen["advantages"] += advantages[mask].tolist()
        return plain_policy(logprobs, old, advantages, mask, *rest)

    def value_loss(values: Any, old: Any, returns: Any, mask: Any, clip: float) -> Any:
        seen["returns"] += returns[mask].tolist()
        return plain_value(values, old, returns, mask, clip)

    monkeypatch.setattr(ppo, "policy_loss", policy_loss)
    monkeypatch.setattr(ppo, "value_loss", value_loss)
    return seen


def test_line_04_prompts_that_are_cut_or_do_not_fit_are_counted(
    folders: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, model_config = AutoTokenizer.from_pretrained(folders["sft"]), AutoConfig.from_pretrained(folders["sft"])
    texts = ["the cat", "a dog", "the cat " * 60, "the cat sat\n" * 20 + "a red house"]
    row = {"completions": ["a", "b"], "ranks": [1, 2], "rater_id": "r", "source": "s", "split": "train"}
    rows = [{**row, "ranking_id": text, "prompt": [{"role": "user", "content": text}]} for text in texts]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "part-00000.parquet")
    prompts, left_out = read_prompts(make_config(batch_prompts=2), tokenizer, model_config, tmp_path)
    assert (len(prompts), left_out) == (3, 1)
    limit = 64 - 10  # context and budget
    assert f"1 prompts do not fit {limit} tokens and are left out; 1 were cut at the front" in caplog.text
    last = tokenizer.decode(max(prompts, key=len))
    assert last.endswith("a red house<|end|><|assistant|>")
    assert last.startswith("<|user|>the cat sat\n"), "cut between two lines"


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_line_17_all_log_probabilities_are_at_the_sampling_temperature(folders: dict[str, Any], temperature: float) -> None:
    config, roles = make_config(temperature=temperature), make_roles(folders)
    experience = experienced(config, roles)
    for row, completion in enumerate(experience.completions):
        expected = plain_logprobs(folders["sft"], completion, temperature)
        chosen = expected[torch.arange(len(expected)), completion.token_ids]
        for found in (experience.logprobs_old_BT, experience.logprobs_reference_BT):  # at the start both are SFT's
            torch.testing.assert_close(
                found[row][experience.batch.completion_mask_BT[row]], chosen, atol=1e-3, rtol=1e-3, check_dtype=False
            )
    numbers, _ = learn(config, roles, experience)
    assert numbers["kl_old"] == pytest.approx(0.0, abs=1e-6), "the new policy's are at another temperature than the old one's"


def test_line_18_what_stands_behind_the_first_eos_changes_nothing(folders: dict[str, Any]) -> None:
    config = make_config(epochs=2, minibatches=2)
    outcomes = []
    for filler in (None, 7):
        roles = make_roles(folders)
        experience = experienced(config, roles)
        for completion, ids, mask in zip(
            experience.completions, experience.batch.ids_BT, experience.batch.completion_mask_BT, strict=True
        ):
            assert ids[mask].tolist() == completion.token_ids
            assert EOS not in completion.token_ids[:-1]
        if filler is not None:
            ids_BT = torch.where(experience.batch.attention_BT.bool(), experience.batch.ids_BT, filler)
            experience = experience._replace(batch=Batch(ids_BT, *experience.batch[1:]))
        numbers, _ = learn(config, roles, experience)
        outcomes.append((numbers | statistics(experience), weights_of(roles.policy.trainable), weights_of(roles.value.trainable)))
    (one, *weights_one), (other, *weights_other) = outcomes
    assert one == other
    for a, b in zip(weights_one, weights_other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def updates_of(folders: dict[str, Any], count: int, **changes: Any) -> tuple[list[dict[str, Any]], Progress]:
    config, roles = make_config(minibatches=2, **changes), make_roles(folders)
    progress = Progress(config, roles)
    for _ in range(count):
        one_update(config, progress, encoded(roles), last=False)
    return timeless(progress), progress


def timeless(progress: Progress) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in progress.history]


def test_line_20_the_same_seed_gives_the_same_run_and_another_does_not(folders: dict[str, Any]) -> None:
    (one, first), (again, second), (other, _) = (updates_of(folders, 2, seed=seed) for seed in (3, 3, 4))
    assert one == again != other
    for a, b in zip(weights_of(first.roles.policy.trainable), weights_of(second.roles.policy.trainable), strict=True):
        assert torch.equal(a, b)


def test_line_20_sampling_and_the_order_of_rows_do_not_draw_from_each_other(folders: dict[str, Any]) -> None:
    """More tokens to sample leave the order's stream where it is, and more epochs to shuffle that of the sampling."""
    short, long, twice = (updates_of(folders, 1, **changes)[1] for changes in ({"max_new_tokens": 2}, {}, {"epochs": 2}))
    order, sampling = ([getattr(each, name).get_state() for each in (short, long, twice)] for name in ("order", "sampling"))
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[1], order[2])
    assert torch.equal(sampling[1], sampling[2])
    assert not torch.equal(sampling[0], sampling[1])
    assert long.order.initial_seed() != long.sampling.initial_seed()


def test_line_20_another_engine_gets_a_seed_for_each_completion_from_the_stream_of_the_sampling(folders: dict[str, Any]) -> None:
    config, roles = make_config(samples_per_prompt=2), make_roles(folders)
    asked: list[tuple[list[list[int]], list[int]]] = []

    def engine(prompts: list[list[int]], seeds: list[int], **options: Any) -> list[tuple[list[int], torch.Tensor]]:
        assert options == {"max_new_tokens": 10, "temperature": 1.0}
        asked.append((prompts, seeds))
        return [([20 + number, EOS], torch.tensor([-1.0, -2.0])) for number in range(len(prompts))]

    generator = torch.Generator().manual_seed(0)
    first = roll_out(config, roles, encoded(roles), generator, engine)  # type: ignore[arg-type]
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    for stream in (generator, resumed):
        roll_out(config, roles, encoded(roles), stream, engine)  # type: ignore[arg-type]
    assert asked[0][0] == [prompt for prompt in encoded(roles) for _ in range(2)]
    assert len({*asked[0][1], *asked[1][1]}) == 24
    assert asked[1] == asked[2]
    assert [each.token_ids[0] for each in first] == list(range(20, 32))
    assert all(each.ended for each in first)


def test_line_22_the_samplers_log_probabilities_are_compared_with_the_trainers(folders: dict[str, Any]) -> None:
    config, roles = make_config(), make_roles(folders)
    drawn = roll_out(config, roles, encoded(roles), torch.Generator().manual_seed(0))
    assert statistics(look_at(config, roles, drawn))["logprob_mismatch"] < 1e-3
    wrong = drawn[2].logprobs.clone()
    wrong[-1] -= 0.25
    drawn[2] = drawn[2]._replace(logprobs=wrong)
    numbers, tokens = statistics(look_at(config, roles, drawn)), sum(len(each.token_ids) for each in drawn)
    assert numbers["logprob_mismatch"] == pytest.approx(0.25, abs=1e-3)
    assert numbers["logprob_mismatch_mean"] == pytest.approx(0.25 / tokens, abs=1e-4)
    assert numbers["kl_sampler"] == pytest.approx((math.exp(0.25) - 1.25) / tokens, rel=1e-2)


def test_line_22_the_policy_learns_as_if_the_trainer_had_drawn_what_another_engine_drew(folders: dict[str, Any]) -> None:
    """The gradient is that of the weighted tokens, one by one; torch's own samples weigh 1, and so do all where the cap is 0."""
    roles = make_roles(folders)
    drawn = roll_out(make_config(), roles, encoded(roles), torch.Generator().manual_seed(0))
    shifts = [torch.linspace(-0.5, 1.0, len(each.token_ids)) for each in drawn]
    drawn = [each._replace(logprobs=each.logprobs - shift) for each, shift in zip(drawn, shifts, strict=True)]
    config = make_config(rollout_engine="vllm", sampler_ratio_cap=2.0)
    experience = look_at(config, roles, drawn)
    assert experience.sampler_weights_BT is not None
    for row, (shift, mask) in enumerate(zip(shifts, experience.batch.completion_mask_BT, strict=True)):
        expected = torch.exp(shift).clamp(max=2.0)
        torch.testing.assert_close(experience.sampler_weights_BT[row][mask], expected, atol=1e-3, rtol=1e-3)
        assert (experience.sampler_weights_BT[row][~mask] == 1).all()
    torch.testing.assert_close(experience.logprobs_old_BT, look_at(make_config(), roles, drawn).logprobs_old_BT, atol=0, rtol=0)

    def gradient(experience: Experience, advantages_BT: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.arange(len(drawn))
        add_policy_gradient(config, roles, experience, advantages_BT, [MicroBatch(rows, experience.batch)])
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in roles.policy.trainable]
        for parameter in roles.policy.trainable:
            parameter.grad = None
        return found

    advantages_BT = torch.randn(experience.logprobs_old_BT.shape, generator=torch.Generator().manual_seed(5))
    weighted = gradient(experience, advantages_BT)
    by_hand = gradient(experience._replace(sampler_weights_BT=None), advantages_BT * experience.sampler_weights_BT)
    unweighted = gradient(experience._replace(sampler_weights_BT=None), advantages_BT)
    for one, other in zip(weighted, by_hand, strict=True):
        torch.testing.assert_close(one, other)
    assert any(not torch.allclose(one, other, rtol=1e-2) for one, other in zip(weighted, unweighted, strict=True))
    for changes in ({"rollout_engine": "torch"}, {"rollout_engine": "vllm", "sampler_ratio_cap": 0.0}):
        assert look_at(make_config(**changes), roles, drawn).sampler_weights_BT is None


def test_line_24_no_discount_and_lambda_095_are_the_defaults() -> None:
    assert (Config().gamma, Config().lam) == (1.0, 0.95)


@pytest.mark.parametrize("micro_batch_tokens", [64, 100_000])
def test_line_25_the_policy_learns_whitened_advantages_and_the_value_model_plain_returns(
    folders: dict[str, Any], taught: dict[str, list[float]], micro_batch_tokens: int
) -> None:
    config, roles = make_config(micro_batch_tokens=micro_batch_tokens), make_roles(folders)
    experience = experienced(config, roles)
    reference_BT = experience.logprobs_reference_BT + 0.3 * torch.randn(
        experience.logprobs_reference_BT.shape, generator=torch.Generator().manual_seed(2)
    )
    experience = experience._replace(logprobs_reference_BT=reference_BT)
    learn(config, roles, experience, beta=0.5)
    advantages, returns = by_hand(experience, beta=0.5)
    assert sum(taught["advantages"]) / len(advantages) == pytest.approx(0.0, abs=1e-5)
    assert sorted(taught["advantages"]) == pytest.approx(sorted(advantages), abs=1e-4)
    assert sorted(taught["returns"]) == pytest.approx(sorted(returns), abs=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [64, 100_000])
def test_line_26_rewards_are_whitened_over_the_whole_batch_and_keep_their_mean(
    folders: dict[str, Any], taught: dict[str, list[float]], micro_batch_tokens: int
) -> None:
    config, roles = make_config(whiten_rewards=True, micro_batch_tokens=micro_batch_tokens), make_roles(folders)
    experience = experienced(config, roles)
    learn(config, roles, experience)
    advantages, returns = by_hand(experience, beta=0.1, whiten_rewards=True)
    assert sorted(taught["advantages"]) == pytest.approx(sorted(advantages), abs=1e-3)
    assert sorted(taught["returns"]) == pytest.approx(sorted(returns), abs=1e-3)


def test_line_27_clips_are_02_and_the_value_loss_weighs_01(folders: dict[str, Any]) -> None:
    config = make_config()
    assert (config.clip, config.value_clip, config.value_coefficient) == (0.2, 0.2, 0.1)
    norms = []
    for coefficient in (0.1, 0.2):
        config, roles = make_config(value_coefficient=coefficient), make_roles(folders)
        norms.append(learn(config, roles, experienced(config, roles))[0]["value_gradient_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


def test_line_31_beta_is_fixed_or_follows_the_target_once_an_update(folders: dict[str, Any]) -> None:
    rows, progress = updates_of(folders, 2)
    assert [row["beta"] for row in rows] == [0.05, 0.05]
    assert progress.beta == 0.05
    rows, progress = updates_of(folders, 2, kl_target=1000.0, kl_horizon=60)
    # 6 completions an update, KL far below the target: 0.05 (1 - 0.2 * 6 / 60), and again.
    assert [row["beta"] for row in rows] == pytest.approx([0.05, 0.05 * 0.98])
    assert progress.beta == pytest.approx(0.05 * 0.98**2)


LOGGED = {
    *(
        "reward",
        "judge_reward",
        "judge_error",
        "judge_error_smoothed",
        "reward_smoothed",
        "judge_smoothed",
        "judge_penalised",
        "kl_reference",
        "sqrt_kl_reference",
        "kl_old",
        "entropy",
    ),
    *("clip_fraction", "value_clip_fraction", "explained_variance", "completion_tokens", "eos_fraction", "same_answer_fraction"),
    *("policy_loss", "value_loss", "gradient_norm", "value_gradient_norm", "beta", "learning_rate"),
    *("logprob_mismatch", "logprob_mismatch_mean", "kl_sampler"),
    *("tokens_per_second", "rollout_seconds", "score_seconds", "optimise_seconds"),
}


def test_line_34_every_number_is_logged_at_every_update(folders: dict[str, Any]) -> None:
    config, roles = make_config(), make_roles(folders)
    progress = Progress(config, roles)
    for _ in range(2):
        one_update(config, progress, encoded(roles), last=False)
    for row in progress.history:
        assert {key for key, value in row.items() if isinstance(value, float) and math.isfinite(value)} >= LOGGED


def test_line_34_means_are_over_completions_and_their_real_tokens(folders: dict[str, Any]) -> None:
    """Lengths 1 to 10, so that half of the batch is padding."""
    config, roles = make_config(), make_roles(folders)
    experience = experienced(config, roles)
    drift_BT = torch.arange(experience.logprobs_old_BT.numel()).view(experience.logprobs_old_BT.shape) / 100.0
    experience = experience._replace(logprobs_reference_BT=experience.logprobs_old_BT - drift_BT)
    numbers = statistics(experience)
    entropies = []
    for completion in experience.completions:
        logprobs = plain_logprobs(folders["sft"], completion, 1.0).double()
        entropies += (-logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1).tolist()
    assert numbers["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-3)
    kl = [sum(row) for row in rows_of(experience, drift_BT)]
    assert numbers["kl_reference"] == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert numbers["sqrt_kl_reference"] == pytest.approx(math.sqrt(sum(kl) / 6), rel=1e-4)
    assert numbers["completion_tokens"] == pytest.approx((1 + 4 + 7 + 10 + 1 + 4) / 6)
    assert numbers["eos_fraction"] == pytest.approx(0.5)
    assert numbers["reward"] == pytest.approx(sum(experience.scores_B.tolist()) / 6)
    assert numbers["judge_reward"] == pytest.approx(sum(experience.judge_B.tolist()) / 6)


def test_line_37_a_run_goes_on_from_its_state_with_the_same_bits(folders: dict[str, Any], tmp_path: Path) -> None:
    changes = {"kl_target": 0.01, "kl_horizon": 60}
    expected, whole = updates_of(folders, 3, **changes)
    _, part = updates_of(folders, 1, **changes)
    part.update = 1
    checkpoint.save(part.state(), str(tmp_path / "state"))
    config, roles = make_config(minibatches=2, **changes), make_roles(folders)
    resumed = Progress(config, roles)
    resumed.load(checkpoint.load(str(tmp_path / "state")))
    for _ in range(2):
        one_update(config, resumed, encoded(roles), last=False)
    assert timeless(resumed) == expected
    assert (resumed.beta, resumed.best_update) == (whole.beta, whole.best_update)
    for name in ("policy", "value"):
        ours, theirs = (weights_of(getattr(each.roles, name).trainable) for each in (resumed, whole))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.best, whole.best, strict=True))


def test_mistake_value_the_value_model_and_its_optimiser_come_back(folders: dict[str, Any], tmp_path: Path) -> None:
    """One library saves the policy alone, and starts the value model anew from the reward model."""
    _, trained = updates_of(folders, 2, value_learning_rate=0.05)
    checkpoint.save(trained.state(), str(tmp_path / "state"))
    fresh = Progress(make_config(), make_roles(folders))
    learned, anew = (weights_of(each.roles.value.trainable) for each in (trained, fresh))
    assert any(not torch.equal(a, b) for a, b in zip(learned, anew, strict=True))
    fresh.load(checkpoint.load(str(tmp_path / "state")))
    assert all(torch.equal(a, b) for a, b in zip(learned, weights_of(fresh.roles.value.trainable), strict=True))
    ours, theirs = (each.optimisers.value.state() for each in (fresh, trained))
    assert ours["taken"] == theirs["taken"] == 4
    assert all(torch.equal(ours["adamw"][key]["exp_avg"], theirs["adamw"][key]["exp_avg"]) for key in theirs["adamw"])


def test_mistake_clipping_neither_model_takes_a_gradient_longer_than_one(folders: dict[str, Any]) -> None:
    """After one step Adam's first moment is a tenth of the gradient that it was given."""
    config, roles = make_config(), make_roles(folders)
    experience = experienced(config, roles)
    numbers, progress = learn(config, roles, experience._replace(scores_B=1000 * experience.scores_B))
    assert numbers["value_gradient_norm"] > 10, "it would not fit"

    def given(optimiser: Optimiser) -> float:
        moments = [each["exp_avg"] for each in optimiser.state()["adamw"].values()]
        return float(torch.cat([each.flatten() for each in moments]).norm()) / 0.1

    assert given(progress.optimisers.value) == pytest.approx(1.0, rel=1e-3)
    assert given(progress.optimisers.policy) == pytest.approx(min(1.0, numbers["gradient_norm"]), rel=1e-3)
