"""A MODEL argument -> its config, its weights and its tokenizer."""
