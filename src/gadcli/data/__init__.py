"""Data: the row contract, checks, lengths, tokenisation and the resumable order of batches."""
