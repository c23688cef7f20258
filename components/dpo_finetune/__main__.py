"""Runs the stage alone: `python -m components.dpo_finetune --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("dpo_finetune")
