"""Pure tensor functions of the algorithm: scores, losses, advantages. Imports torch and nothing of ours."""
