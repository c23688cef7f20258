"""Runs the stage alone: `python -m components.close_run --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("close_run")
