"""KFP wrapper of the stage `dpo_finetune`: the fine-tuned policy."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def dpo_finetune(
    config: dict,
    snapshot_uri: str,
    sft_uri: str,
    judge_model_uri: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", policy_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    inputs = {"snapshot_uri": snapshot_uri, "sft_uri": sft_uri, "judge_model_uri": judge_model_uri}
    return launch("dpo_finetune", config, inputs, metrics=metrics)
