"""KFP wrapper of the stage `ingest_rankings`: rankings to an immutable snapshot."""

from typing import NamedTuple

from kfp import dsl

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def ingest_rankings(
    config: dict,
    rankings: str,
    fingerprint: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", snapshot_uri=str, ingest_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch("ingest_rankings", config, {"rankings": rankings, "fingerprint": fingerprint}, metrics=metrics)
