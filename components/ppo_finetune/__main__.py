"""Runs the stage alone: `python -m components.ppo_finetune --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("ppo_finetune")
