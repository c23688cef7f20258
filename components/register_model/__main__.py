"""Runs the stage alone: `python -m components.register_model --help`."""

from components.services.launch import main

if __name__ == "__main__":
    main("register_model")
