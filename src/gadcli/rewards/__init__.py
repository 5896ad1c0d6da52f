"""Rewards beside the discriminator: rules over an answer's text, the user's functions and commands. No torch."""
