"""The graphs, their profiles, and the client that runs and submits them."""

# In the order of the graph; each has a package below `components`, and a parameter `<stage>_config` of the pipeline.
STAGES = (
    "ingest_rankings",
    "validate_data",
    "train_sft",
    "train_reward_model",
    "ppo_finetune",
    "evaluate",
    "register_model",
)
