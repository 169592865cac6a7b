"""Pruned folder and training data -> the same model, trained."""
