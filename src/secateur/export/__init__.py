"""Folder -> GGUF, int8, merged adapters: what other programs load."""
