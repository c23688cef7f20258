"""KFP wrapper of the stage `detect_drift`: whether to retrain."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def detect_drift(
    config: dict,
    snapshot_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", decision=str, reason=str, drift_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch("detect_drift", config, {"snapshot_uri": snapshot_uri}, metrics=metrics, html=report)
