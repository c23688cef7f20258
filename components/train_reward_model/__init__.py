"""Stage: trains the reward model that PPO optimises, and a second one that judges."""
