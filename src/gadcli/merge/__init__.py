"""Checkpoints and foreign formats to Hugging Face folders."""
