"""Smaller model -> a folder that the usual loaders read, written whole or not at all."""
