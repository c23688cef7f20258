"""Judges beside the held-out reward model: a language model behind an OpenAI-compatible endpoint, and people in Label Studio."""
