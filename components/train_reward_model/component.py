"""KFP wrapper of the stage `train_reward_model`: reward model and judge."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def train_reward_model(
    config: dict,
    snapshot_uri: str,
    policy_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", reward_model_uri=str, judge_model_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch(
        "train_reward_model", config, {"snapshot_uri": snapshot_uri, "policy_uri": policy_uri}, metrics=metrics, html=report
    )
