"""Stage: watches whether new rankings are still like those that the champion learned from, and decides on a retrain."""
