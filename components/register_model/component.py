"""KFP wrapper of the stage `register_model`: a version of the registry."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def register_model(
    config: dict,
    candidate_uri: str,
    reward_model_uri: str,
    evaluation_uri: str,
    gate: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", version=str, alias=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch(
        "register_model",
        config,
        {"candidate_uri": candidate_uri, "reward_model_uri": reward_model_uri, "evaluation_uri": evaluation_uri, "gate": gate},
        metrics=metrics,
        html=report,
    )
