"""KFP wrapper of the stage `validate_data`: a gate on the data."""

from typing import NamedTuple

from kfp import dsl

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def validate_data(
    config: dict,
    snapshot_uri: str,
    ingest_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    rater_report: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", gate=str, reason=str, warnings=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    inputs = {"snapshot_uri": snapshot_uri, "ingest_uri": ingest_uri}
    return launch("validate_data", config, inputs, metrics=metrics, html=report, pages={"rater_report.html": rater_report})
