"""Checkpoints on disk: which are whole, what they hold, and the way to a Hugging Face folder. No torch."""
