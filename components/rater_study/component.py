"""KFP wrapper of the stage `rater_study`: a report on raters never seen."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def rater_study(
    config: dict,
    reward_model_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", study_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch("rater_study", config, {"reward_model_uri": reward_model_uri}, metrics=metrics, html=report)
