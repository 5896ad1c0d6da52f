"""Processes, models, sampler and checkpoints: everything a stage runs on. Imports nothing by itself."""
