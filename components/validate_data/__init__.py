"""Stage: a gate on the data, before anything learns from it."""
