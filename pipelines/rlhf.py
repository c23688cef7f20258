"""The RLHF graph: rankings in, a registered policy out, with a gate after the data and a gate before the promotion.

Each stage's settings travel as one parameter that is named like the stage and checked by the stage's own `Config`; sixty flat
parameters would be checked by nobody and read by nobody.
"""

from kfp import dsl

from components.close_run.component import close_run
from components.evaluate.component import evaluate
from components.ingest_rankings.component import ingest_rankings
from components.ppo_finetune.component import ppo_finetune
from components.register_model.component import register_model
from components.stop_run.component import stop_run
from components.train_reward_model.component import train_reward_model
from components.train_sft.component import train_sft
from components.validate_data.component import validate_data


@dsl.pipeline(name="rlhf", description="Human rankings to a promoted policy: SFT, reward model, PPO, evaluation, registry.")
def rlhf(
    rankings: str,
    rankings_fingerprint: str = "",
    demonstrations: str = "",
    sft_fingerprint: str = "",
    ingest_rankings_config: dict = {},  # noqa: B006 - KFP stores the default, nobody can change it
    validate_data_config: dict = {},  # noqa: B006
    train_sft_config: dict = {},  # noqa: B006
    train_reward_model_config: dict = {},  # noqa: B006
    ppo_finetune_config: dict = {},  # noqa: B006
    evaluate_config: dict = {},  # noqa: B006
    register_model_config: dict = {},  # noqa: B006
) -> None:
    """Builds the graph.

    Args:
        rankings: file, folder, s3:// prefix or hf:// name of the rankings.
        rankings_fingerprint: changes whenever their content does; KFP's cache key knows parameters, not contents.
        demonstrations: JSONL for SFT; empty: SFT learns from the rankings' completions.
        sft_fingerprint: changes whenever the content of the demonstrations or of a local base model does.
        ingest_rankings_config, ...: values of the stages' settings; missing ones take their defaults.
    """
    closing = close_run()
    closing.set_caching_options(False)
    with dsl.ExitHandler(closing):
        data = ingest_rankings(config=ingest_rankings_config, rankings=rankings, fingerprint=rankings_fingerprint)
        valid = validate_data(
            config=validate_data_config, snapshot_uri=data.outputs["snapshot_uri"], ingest_uri=data.outputs["ingest_uri"]
        )
        with dsl.If(valid.outputs["gate"] == "pass", name="data-pass"):
            snapshot_uri = data.outputs["snapshot_uri"]
            sft = train_sft(
                config=train_sft_config, snapshot_uri=snapshot_uri, demonstrations=demonstrations, fingerprint=sft_fingerprint
            )
            reward = train_reward_model(
                config=train_reward_model_config, snapshot_uri=snapshot_uri, policy_uri=sft.outputs["policy_uri"]
            )
            policy = ppo_finetune(
                config=ppo_finetune_config,
                snapshot_uri=snapshot_uri,
                sft_uri=sft.outputs["policy_uri"],
                reward_model_uri=reward.outputs["reward_model_uri"],
                judge_model_uri=reward.outputs["judge_model_uri"],
            )
            verdict = evaluate(
                config=evaluate_config,
                snapshot_uri=snapshot_uri,
                candidate_uri=policy.outputs["policy_uri"],
                sft_uri=sft.outputs["policy_uri"],
                reward_model_uri=reward.outputs["reward_model_uri"],
                judge_model_uri=reward.outputs["judge_model_uri"],
            )
            verdict.set_caching_options(False)  # depends on who is champion
            registered = {
                "config": register_model_config,
                "candidate_uri": policy.outputs["policy_uri"],
                "reward_model_uri": reward.outputs["reward_model_uri"],
                "evaluation_uri": verdict.outputs["evaluation_uri"],
            }
            with dsl.If(verdict.outputs["gate"] == "pass", name="policy-pass"):
                register_model(**registered, gate="pass").set_caching_options(False).set_display_name("promote")
            with dsl.Else(name="policy-fail"):
                register_model(**registered, gate="fail").set_caching_options(False).set_display_name("keep-as-challenger")
        with dsl.Else(name="data-fail"):
            stop_run(stage="validate_data", reason=valid.outputs["reason"]).set_caching_options(False)
