"""Placeholder that the next change replaces: the comparison with LLM-Pruner's own measurements."""
