"""The watch: rankings in, a look at them, and the RLHF graph again if they drifted. Run it on a schedule.

It takes the parameters of the graph `rlhf` and hands them on, so that a retrain is the run that a person would have started. The
nested graph ingests the same rankings; the digest of its snapshot is the same, and a cluster's cache has it.
"""

from typing import Any

from kfp import dsl

from components.close_run.component import close_run
from components.detect_drift.component import detect_drift
from components.ingest_rankings.component import ingest_rankings
from pipelines.placement import Gpus, default_gpus, placed_by
from pipelines.resources import Resources
from pipelines.rlhf import rlhf_graph


def drift_watch_graph(resources: Resources | None = None) -> Any:
    """The graph as a KFP pipeline, its tasks placed by the table of resources; without one, as a machine alone runs it."""
    gpus = default_gpus(resources)
    rlhf = rlhf_graph(resources)

    @dsl.pipeline(name="drift-watch", description="Compares new rankings with the champion's, and retrains if they drifted.")
    def drift_watch(
        rankings: str,
        method: str = "ppo",
        rater_study: str = "off",
        rankings_fingerprint: str = "",
        demonstrations: str = "",
        sft_fingerprint: str = "",
        pretraining: str = "",
        pretraining_fingerprint: str = "",
        small_gpu: str = gpus.small_gpu,
        small_gpu_nodes: dict = gpus.small_gpu_nodes,
        large_gpu: str = gpus.large_gpu,
        large_gpu_nodes: dict = gpus.large_gpu_nodes,
        gpu_tolerations: list = gpus.gpu_tolerations,
        detect_drift_config: dict = {},  # noqa: B006 - KFP stores the default, nobody can change it
        ingest_rankings_config: dict = {},  # noqa: B006
        validate_data_config: dict = {},  # noqa: B006
        train_sft_config: dict = {},  # noqa: B006
        train_reward_model_config: dict = {},  # noqa: B006
        rater_study_config: dict = {},  # noqa: B006
        ppo_finetune_config: dict = {},  # noqa: B006
        dpo_finetune_config: dict = {},  # noqa: B006
        evaluate_config: dict = {},  # noqa: B006
        register_model_config: dict = {},  # noqa: B006
    ) -> None:
        """Builds the graph.

        Args:
            detect_drift_config: values of the settings of `detect_drift`; missing ones take their defaults.
            rankings, ...: as of the graph `rlhf`; all rankings, old and new: a retrain learns from all of them.
        """
        placed = placed_by(resources, Gpus(small_gpu, small_gpu_nodes, large_gpu, large_gpu_nodes, gpu_tolerations))
        closing = placed(close_run())
        closing.set_caching_options(False)
        with dsl.ExitHandler(closing):
            data = placed(ingest_rankings(config=ingest_rankings_config, rankings=rankings, fingerprint=rankings_fingerprint))
            drift = placed(detect_drift(config=detect_drift_config, snapshot_uri=data.outputs["snapshot_uri"]))
            drift.set_caching_options(False)  # depends on who is champion, and on what was looked at before
            # KFP 2.17's local runner cannot read a task's named output in the condition of a lone branch beside that task: it
            # warns, skips the branch and succeeds. Within a branch the output is an input, so the outer branch, which is always
            # taken, is there for the inner one's sake.
            with dsl.If(rankings != "", name="looked"):
                with dsl.If(drift.outputs["decision"] == "retrain", name="retrain"):
                    rlhf(
                        rankings=rankings,
                        method=method,
                        rater_study=rater_study,
                        rankings_fingerprint=rankings_fingerprint,
                        demonstrations=demonstrations,
                        sft_fingerprint=sft_fingerprint,
                        pretraining=pretraining,
                        pretraining_fingerprint=pretraining_fingerprint,
                        small_gpu=small_gpu,
                        small_gpu_nodes=small_gpu_nodes,
                        large_gpu=large_gpu,
                        large_gpu_nodes=large_gpu_nodes,
                        gpu_tolerations=gpu_tolerations,
                        ingest_rankings_config=ingest_rankings_config,
                        validate_data_config=validate_data_config,
                        train_sft_config=train_sft_config,
                        train_reward_model_config=train_reward_model_config,
                        rater_study_config=rater_study_config,
                        ppo_finetune_config=ppo_finetune_config,
                        dpo_finetune_config=dpo_finetune_config,
                        evaluate_config=evaluate_config,
                        register_model_config=register_model_config,
                    )

    return drift_watch
