"""Sampling and weight sync."""
