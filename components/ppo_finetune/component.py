"""KFP wrapper of the stage `ppo_finetune`: the fine-tuned policy."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def ppo_finetune(
    config: dict,
    snapshot_uri: str,
    sft_uri: str,
    reward_model_uri: str,
    judge_model_uri: str,
    pretraining: str,
    fingerprint: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", policy_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch(
        "ppo_finetune",
        config,
        {
            "snapshot_uri": snapshot_uri,
            "sft_uri": sft_uri,
            "reward_model_uri": reward_model_uri,
            "judge_model_uri": judge_model_uri,
            "pretraining": pretraining,
            "fingerprint": fingerprint,
        },
        metrics=metrics,
    )
