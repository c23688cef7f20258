"""Runs the stage alone: `python -m components.validate_data --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("validate_data")
