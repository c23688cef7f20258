"""Shapes, work, GPUs and stages of a plan of capacity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from components.rlhf.memory import Share, cache_bytes, sharding_shares
from components.services.exits import DoNotRetry
from pipelines.capacity.gpus import GPUS, TRAINING, decode_seconds, efficiency, efficiency_is_measured, gpu
from pipelines.capacity.placing import place
from pipelines.capacity.shapes import SHAPES, Shape, config_of, llama_config
from pipelines.capacity.stages import Division, Job, Need, data_of, parameters_of
from pipelines.capacity.work import forward_flops, training_flops

TINY = Shape(64, 128, 2, 4, 2, 512, True, 0)


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_shape_has_the_parameters_that_its_makers_publish(name: str) -> None:
    assert parameters_of(llama_config(SHAPES[name], 128)) == SHAPES[name].parameters


def test_work_is_what_torch_counts_but_for_attention_to_later_tokens() -> None:
    config = llama_config(TINY, 128)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    tokens = 32
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.ones((1, tokens), dtype=torch.long)).logits.sum()
    later = 2 * config.num_hidden_layers * config.hidden_size * tokens**2  # torch counts the half that a mask takes away, too
    rotary = config.head_dim * tokens  # angles: positions by frequencies
    forward = forward_flops(config, [tokens], tokens)
    assert forward + later == pytest.approx(counter.get_total_flops(), abs=2 * rotary)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = training_flops(forward, adapters=False) - forward
    assert backward + 2 * later == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert training_flops(forward, adapters=True) == 2 * forward
    assert training_flops(forward, adapters=True, adapted_share=0.25) == int(1.25 * forward)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 100))
def test_the_work_of_sequences_is_the_sum_of_each(lengths: list[int], predicted: int) -> None:
    config = llama_config(TINY, 128)
    apart = sum(forward_flops(config, [each]) for each in lengths) + forward_flops(config, [], predicted)
    assert forward_flops(config, lengths, predicted) == apart


def test_a_model_is_a_folder_a_configuration_or_a_known_name(tmp_path: Path) -> None:
    llama_config(TINY, 128).save_pretrained(tmp_path)
    for given_model in (str(tmp_path), str(tmp_path / "config.json")):
        assert config_of(given_model).hidden_size == 64
    for name in ("Llama-3.1-8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"):
        assert config_of(name).hidden_size == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_local_experts": 8, "model_type": "mixtral"}, "experts"), ({"model_type": "no-such-type"}, "unknown model")],
)
def test_a_model_that_cannot_be_planned_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = {**json.loads(llama_config(TINY, 128).to_json_string()), **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(DoNotRetry, match=message):
        config_of(str(tmp_path))


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"no config\.json"):
        config_of(str(tmp_path))


def test_every_gpu_is_sound_and_names_its_source() -> None:
    for name, each in GPUS.items():
        assert gpu(name.lower()) == each
        assert each.sheet.startswith("https://www.nvidia.com/")
        # Of these generations each does 90 to 450 operations while it reads a byte; a rate with sparsity, or TB for GB, does not.
        assert 90 < each.tflops * 1000 / each.gb_per_second < 450, name
    with pytest.raises(DoNotRetry, match="did you mean 'H100'"):
        gpu("H10")


def test_the_measured_speeds_are_given_back_and_others_lie_between() -> None:
    assert efficiency(TRAINING, int(8.03e9)) == pytest.approx(0.206)
    assert efficiency(TRAINING, int(70e9)) == pytest.approx(0.206), "beyond the largest: as the largest"
    assert efficiency(TRAINING, 1000) == pytest.approx(0.0035)
    assert 0.129 < efficiency(TRAINING, int(3e9)) < 0.206
    assert efficiency_is_measured("H100", int(3e9))
    assert not efficiency_is_measured("H100", int(70e9))
    assert not efficiency_is_measured("A100-80", int(3e9))


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "seconds"),
    [
        ("SmolLM2-135M", 16, 160, 0.0889),
        ("Llama-3.2-1B", 128, 800, 0.0690),
        ("Llama-3.1-8B", 128, 800, 0.1719),
    ],
)
def test_a_step_of_decoding_takes_what_an_h100_took(name: str, rows: int, tokens: int, seconds: float) -> None:
    shape = SHAPES[name]
    cache = cache_bytes(llama_config(shape, 2048), "bfloat16", rows, tokens)
    groups = shape.heads // shape.key_value_heads
    assert decode_seconds(GPUS["H100"], shape.layers, 2 * shape.parameters, cache, groups) == pytest.approx(seconds, rel=0.1)


WAYS: tuple[tuple[float, Division], ...] = ((50e9, ""), (200e9, "sharded"), (200e9, "spread"))


def _need(size: int, division: Division) -> Need:
    """A stage whose memory is half weights, which may be divided, and half micro-batch of 100 tokens."""

    def shares(micro: int, processes: int) -> list[Share]:
        found = [Share("model", "weights", size // 2), Share("step", "activations", size // 2 * micro // 100)]
        return [*found, *sharding_shares(size // 2, size // 10, processes)] if division and processes > 1 else found

    return Need("train_sft", shares, 100, 10, division, [Job("train", TRAINING, 10**18, 10**6)])


def test_a_stage_gets_the_smallest_gpu_then_smaller_micro_batches_then_several() -> None:
    config = llama_config(TINY, 128)

    def placed(size: float, names: list[str], division: Division = "") -> tuple[str, int, int, str]:
        found = place(_need(int(size), division), names, config, 10**9, 2)
        return found.gpu, found.gpus, found.micro_batch_tokens, found.division

    assert placed(20e9, ["H100", "L4"]) == ("L4", 1, 100, "")
    assert placed(50e9, ["H100", "L4"]) == ("H100", 1, 100, "")
    assert placed(100e9, ["H100", "L4"]) == ("H100", 1, 50, ""), "less in one micro-batch before more GPUs"
    assert placed(200e9, ["H100"]) == ("", 0, 25, "")
    # Weights of 100e9, of which two GPUs hold a half each, and two of ten layers put together.
    assert placed(200e9, ["H100"], "sharded") == ("H100", 4, 25, "sharded")
    assert placed(200e9, ["H100"], "spread") == ("H100", 4, 25, "spread")


def test_gpus_that_take_turns_are_no_faster_than_one() -> None:
    config = llama_config(TINY, 128)
    one, sharded, spread = (place(_need(int(size), way), ["H100"], config, 10**9, 2) for size, way in WAYS)
    assert (sharded.gpus, spread.gpus) == (4, 4)
    assert sharded.hours == pytest.approx(one.hours / 4)
    assert spread.hours == one.hours
    assert all(each.extrapolated for each in spread.timed), "it was measured on one"


def test_prompts_that_do_not_fit_the_context_are_refused() -> None:
    stages = {"ppo_finetune": {"max_new_tokens": 100, "max_prompt_tokens": 0}, "train_sft": {"context_tokens": 256}}
    config = llama_config(TINY, 128)
    assert data_of(config, stages, 1, 2, 0, 0)[2:] == (28, 100)
    with pytest.raises(DoNotRetry, match="context of 128"):
        data_of(config, stages, 1, 2, 60, 100)
