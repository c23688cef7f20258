"""KFP wrapper of the stage `evaluate`: a gate on the policy."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def evaluate(
    config: dict,
    snapshot_uri: str,
    candidate_uri: str,
    rival_uri: str,
    sft_uri: str,
    reward_model_uri: str,
    judge_model_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", gate=str, evaluation_uri=str, champion_version=str, candidate_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch(
        "evaluate",
        config,
        {
            "snapshot_uri": snapshot_uri,
            "candidate_uri": candidate_uri,
            "rival_uri": rival_uri,
            "sft_uri": sft_uri,
            "reward_model_uri": reward_model_uri,
            "judge_model_uri": judge_model_uri,
        },
        metrics=metrics,
        html=report,
    )
