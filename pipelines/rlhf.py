"""The RLHF graph: rankings in, a registered policy out, with a gate after the data and a gate before the promotion.

Each stage's settings travel as one parameter that is named like the stage and checked by the stage's own `Config`; sixty flat
parameters would be checked by nobody and read by nobody.
"""

from typing import Any

from kfp import dsl

from components.close_run.component import close_run
from components.dpo_finetune.component import dpo_finetune
from components.evaluate.component import evaluate
from components.ingest_rankings.component import ingest_rankings
from components.ppo_finetune.component import ppo_finetune
from components.rater_study.component import rater_study as study_raters
from components.register_model.component import register_model
from components.stop_run.component import stop_run
from components.train_reward_model.component import train_reward_model
from components.train_sft.component import train_sft
from components.validate_data.component import validate_data
from pipelines.placement import Gpus, default_gpus, placed_by
from pipelines.resources import Resources


def rlhf_graph(resources: Resources | None = None) -> Any:
    """The graph as a KFP pipeline, its tasks placed by the table of resources; without one, as a machine alone runs it."""
    gpus = default_gpus(resources)

    @dsl.pipeline(
        name="rlhf", description="Human rankings to a promoted policy: SFT, reward model, PPO or DPO, evaluation, registry."
    )
    def rlhf(
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
        ingest_rankings_config: dict = {},  # noqa: B006 - KFP stores the default, nobody can change it
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
            rankings: file, folder, s3:// prefix or hf:// name of the rankings.
            method: what fine-tunes the policy: "ppo", "dpo", or "both", of which the evaluation then chooses one.
            rater_study: "on" for the study of raters never seen, which needs rater_study's folds; anything else leaves it out.
            rankings_fingerprint: changes whenever their content does; KFP's cache key knows parameters, not contents.
            demonstrations: JSONL for SFT; empty: SFT learns from the rankings' completions.
            sft_fingerprint: changes whenever the content of the demonstrations or of a local base model does.
            pretraining: JSONL of plain text that PPO must not forget; needs ppo_finetune's pretraining_coefficient.
            pretraining_fingerprint: changes whenever its content does.
            small_gpu, large_gpu, small_gpu_nodes, large_gpu_nodes, gpu_tolerations: the GPUs of a cluster (`placement.Gpus`).
            ingest_rankings_config, ...: values of the stages' settings; missing ones take their defaults.
        """
        placed = placed_by(resources, Gpus(small_gpu, small_gpu_nodes, large_gpu, large_gpu_nodes, gpu_tolerations))
        closing = placed(close_run())
        closing.set_caching_options(False)
        with dsl.ExitHandler(closing):
            # An unknown method would take the last branch below. `rankloop run` refuses it before; this ends the run of whoever
            # submits the graph by hand: a cluster starts nothing more once a task has failed.
            with dsl.If(method != "ppo", name="not-ppo"):
                with dsl.If(method != "dpo", name="nor-dpo"):
                    with dsl.If(method != "both", name="nor-both"):
                        placed(stop_run(stage="", reason=f"unknown method {method}: ppo, dpo or both")).set_caching_options(False)
            data = placed(ingest_rankings(config=ingest_rankings_config, rankings=rankings, fingerprint=rankings_fingerprint))
            valid = placed(
                validate_data(
                    config=validate_data_config, snapshot_uri=data.outputs["snapshot_uri"], ingest_uri=data.outputs["ingest_uri"]
                )
            )
            with dsl.If(valid.outputs["gate"] == "pass", name="data-pass"):
                snapshot_uri = data.outputs["snapshot_uri"]
                sft = placed(
                    train_sft(
                        config=train_sft_config,
                        snapshot_uri=snapshot_uri,
                        demonstrations=demonstrations,
                        fingerprint=sft_fingerprint,
                    )
                )
                reward = placed(
                    train_reward_model(
                        config=train_reward_model_config, snapshot_uri=snapshot_uri, policy_uri=sft.outputs["policy_uri"]
                    )
                )
                with dsl.If(rater_study == "on", name="study-raters"):
                    placed(study_raters(config=rater_study_config, reward_model_uri=reward.outputs["reward_model_uri"]))
                sft_uri, judge_model_uri = sft.outputs["policy_uri"], reward.outputs["judge_model_uri"]
                reward_model_uri = reward.outputs["reward_model_uri"]

                def ppo() -> Any:
                    task = ppo_finetune(
                        config=ppo_finetune_config,
                        snapshot_uri=snapshot_uri,
                        sft_uri=sft_uri,
                        reward_model_uri=reward_model_uri,
                        judge_model_uri=judge_model_uri,
                        pretraining=pretraining,
                        fingerprint=pretraining_fingerprint,
                    )
                    return placed(task).outputs["policy_uri"]

                def dpo() -> Any:
                    task = dpo_finetune(
                        config=dpo_finetune_config, snapshot_uri=snapshot_uri, sft_uri=sft_uri, judge_model_uri=judge_model_uri
                    )
                    return placed(task).outputs["policy_uri"]

                def verdict_on(candidate_uri: Any, rival_uri: Any = "") -> Any:
                    task = evaluate(
                        config=evaluate_config,
                        snapshot_uri=snapshot_uri,
                        candidate_uri=candidate_uri,
                        rival_uri=rival_uri,
                        sft_uri=sft_uri,
                        reward_model_uri=reward_model_uri,
                        judge_model_uri=judge_model_uri,
                    )
                    return placed(task).set_caching_options(False).outputs  # depends on who is champion

                with dsl.If(method == "ppo", name="method-ppo"):
                    after_ppo = verdict_on(ppo())
                with dsl.Elif(method == "dpo", name="method-dpo"):
                    after_dpo = verdict_on(dpo())
                with dsl.Else(name="method-both"):
                    after_both = verdict_on(ppo(), dpo())

                def of_verdict(name: str) -> Any:
                    return dsl.OneOf(after_ppo[name], after_dpo[name], after_both[name])

                gate = of_verdict("gate")
                registered = {
                    "config": register_model_config,
                    "candidate_uri": of_verdict("candidate_uri"),
                    "reward_model_uri": reward_model_uri,
                    "evaluation_uri": of_verdict("evaluation_uri"),
                    "gate": gate,  # KFP exports a OneOf from its branches only where a task takes it
                }
                with dsl.If(gate == "pass", name="policy-pass"):
                    placed(register_model(**registered)).set_caching_options(False).set_display_name("promote")
                with dsl.Else(name="policy-fail"):
                    placed(register_model(**registered)).set_caching_options(False).set_display_name("keep-as-challenger")
            with dsl.Else(name="data-fail"):
                placed(stop_run(stage="validate_data", reason=valid.outputs["reason"])).set_caching_options(False)

    return rlhf
