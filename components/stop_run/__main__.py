"""Runs the stage alone: `python -m components.stop_run --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("stop_run")
