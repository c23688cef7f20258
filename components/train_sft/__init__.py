"""Stage: supervised fine-tuning, which makes the starting policy."""
