"""Runs the stage alone: `python -m components.evaluate --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("evaluate")
