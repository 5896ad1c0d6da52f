"""Judging answers without training: text metrics, a fresh discriminator, a judge."""
