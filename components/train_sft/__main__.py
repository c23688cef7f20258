"""Runs the stage alone: `python -m components.train_sft --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("train_sft")
