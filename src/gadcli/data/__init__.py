"""Rows, tokens and batches: from files to what a step trains on."""
