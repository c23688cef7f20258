"""What PPO says that it will take of the memory, before it loads a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.ppo_finetune.memory import plan
from components.ppo_finetune.roles import load_roles
from components.ppo_finetune.stage import Config
from components.rlhf.memory import cache_bytes, table, weights_bytes, weights_file_bytes
from components.rlhf.models import load_policy


@pytest.fixture
def config(folders: dict[str, Any]) -> Config:
    return Config(batch_prompts=6, max_new_tokens=10, micro_batch_tokens=64, **folders["adapter"])


def test_the_shares_of_weights_are_those_of_the_loaded_roles(folders: dict[str, Any], config: Config) -> None:
    shares = plan(config, folders["sft"], [folders["reward"], folders["judge"]], [5, 20])
    found = {(each.role, each.what): each.bytes for each in shares}
    roles = load_roles(folders["sft"], folders["reward"], folders["judge"], precision="float32", seed=0, **folders["adapter"])
    trained = 4 * sum(parameter.numel() for parameter in roles.policy.trainable)
    what = "adapter" if config.lora_rank else "weights"
    assert found["policy", what] == trained
    assert found["policy", "AdamW's moments"] == 2 * trained
    value = 4 * sum(parameter.numel() for parameter in roles.value.trainable)
    assert found["value", what] == pytest.approx(value, rel=0.05)  # a head of a few hundred bytes, or a file's header
    base = sum(share for (role, _), share in found.items() if role == "reference")
    assert base == weights_bytes(load_policy(folders["sft"])[0])
    assert f"{sum(found.values()) / 2**30:7.3f} GiB" in table(shares).splitlines()[-1]


def test_all_weights_in_bfloat16_have_float32_copies(folders: dict[str, Any], config: Config) -> None:
    if config.lora_rank:
        pytest.skip("adapters are float32 anyway")
    scorers = [folders["reward"], folders["judge"]]
    shares = plan(config.model_copy(update={"precision": "bfloat16"}), folders["sft"], scorers, [5, 20])
    found = {(each.role, each.what): each.bytes for each in shares}
    roles = load_roles(*(folders[name] for name in ("sft", "reward", "judge")), precision="bfloat16", seed=0, **folders["adapter"])
    for name, role in (("policy", roles.policy), ("value", roles.value)):
        numbers = sum(parameter.numel() for parameter in role.trainable)
        assert found[name, "weights"] == pytest.approx(2 * numbers, rel=0.05)
        assert found[name, "float32 copy"] == pytest.approx(4 * numbers, rel=0.05)
        assert found[name, "AdamW's moments"] == pytest.approx(8 * numbers, rel=0.05)
    assert found["policy", "copy of the best so far"] == found["policy", "weights"]
    assert found["judge", "weights"] == found["reward", "weights"] == found["value", "weights"]


def test_the_plan_grows_with_micro_batches_and_the_cache_is_keys_and_values(folders: dict[str, Any], config: Config) -> None:
    scorers = [folders["reward"], folders["judge"]]

    def update(tokens: int) -> int:
        return plan(config.model_copy(update={"micro_batch_tokens": tokens}), folders["sft"], scorers, [200])[-1].bytes

    assert update(210) < update(630) < update(1260) == update(10_000), "six completions of 210 tokens are all there is"
    model, _ = load_policy(folders["sft"])
    # 2 (keys, values) x 3 rows x 7 tokens x 2 layers x 2 heads x 8 x 2 bytes
    assert cache_bytes(model.config, "bfloat16", 3, 7) == 2 * 3 * 7 * 2 * 2 * 8 * 2


def test_reading_a_large_file_may_take_more_than_any_update(
    folders: dict[str, Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the base is read its file is mapped: base and file together, where what comes later is less than the file."""
    scorers = [folders["reward"], folders["judge"]]
    assert plan(config, folders["sft"], scorers, [30])[-1].role == "update"
    files = sum(file.stat().st_size for file in folders["sft"].glob("*.safetensors"))
    assert weights_file_bytes(folders["sft"]) == files > weights_bytes(load_policy(folders["sft"])[0])
    monkeypatch.setattr("components.ppo_finetune.memory.weights_file_bytes", lambda folder: 10 * 2**30)
    monkeypatch.setattr("components.ppo_finetune.memory.device", lambda: torch.device("cpu"))
    shares = plan(config, folders["sft"], scorers, [30])
    assert shares[-1].role == "start"
    at_first = sum(share.bytes for share in shares if share.role in ("process", "reference"))
    assert sum(share.bytes for share in shares) == at_first + 10 * 2**30
