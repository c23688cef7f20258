"""Runs the stage alone: `python -m components.detect_drift --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("detect_drift")
