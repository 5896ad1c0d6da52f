"""A model's own way to write conversations: its chat template, its tokenizer, the tokens that end answers."""
