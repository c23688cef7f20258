"""KFP wrapper of the stage `train_sft`: the starting policy."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def train_sft(
    config: dict,
    snapshot_uri: str,
    demonstrations: str,
    fingerprint: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", policy_uri=str):  # type: ignore[valid-type]
    from components.services.launch import launch

    inputs = {"snapshot_uri": snapshot_uri, "demonstrations": demonstrations, "fingerprint": fingerprint}
    return launch("train_sft", config, inputs, metrics=metrics)
