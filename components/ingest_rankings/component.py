"""KFP wrappers of the stage `ingest_rankings`: rankings to an immutable snapshot, in one or by shards that are merged."""

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


@dsl.component(base_image=DATA, install_kfp_package=False)
def ingest_shard(
    config: dict,
    shard: str,
    rankings: str,
    fingerprint: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", snapshot_uri=str, ingest_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    inputs = {"rankings": rankings, "fingerprint": fingerprint}
    return launch("ingest_rankings", {**config, "shard": shard}, inputs, metrics=metrics)


@dsl.component(base_image=DATA, install_kfp_package=False)
def merge_shards(
    config: dict,
    rankings: str,
    shard_reports: list[str],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", snapshot_uri=str, ingest_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    return launch("ingest_rankings", config, {"rankings": rankings, "shard_reports": shard_reports}, metrics=metrics)
