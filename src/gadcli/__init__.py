"""gad: generative adversarial distillation of language models from a teacher's text."""

__version__ = "0.1.0"
