"""What a model needs of a GPU: memory by role, tokens per second, hours and cost."""
