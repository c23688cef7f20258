"""Stage: PPO against the reward model, watched by the judge."""
