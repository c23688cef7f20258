"""The graphs, their profiles, and the client that runs and submits them."""

# In the order of the graph; each has a package below `components`, and a parameter `<stage>_config` of the pipeline.
STAGES = (
    "ingest_rankings",
    "validate_data",
    "train_sft",
    "train_reward_model",
    "rater_study",
    "ppo_finetune",
    "dpo_finetune",
    "evaluate",
    "register_model",
)
WATCH = "detect_drift"  # the stage that the graph `drift_watch` has before all of these
# What fine-tunes the policy; of several candidates the evaluation chooses one.
METHODS = {"ppo": ("ppo_finetune",), "dpo": ("dpo_finetune",), "both": ("ppo_finetune", "dpo_finetune")}


# Stages that only a run which asks for them has: no other stage waits for one.
STUDIES = ("rater_study",)


def stages_of(method: str) -> tuple[str, ...]:
    """The stages that every run with this method has, in the order of the graph."""
    left_out = (*METHODS["both"], *STUDIES)
    return tuple(stage for stage in STAGES if stage not in left_out or stage in METHODS[method])
