"""Checkpoints (ours and verl's) to Hugging Face folders, and anything that names a model to such a folder. No torch."""

from __future__ import annotations
