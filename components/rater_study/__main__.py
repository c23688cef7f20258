"""Runs the stage alone: `python -m components.rater_study --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("rater_study")
