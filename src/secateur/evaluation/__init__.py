"""Loaded models, texts and tasks -> perplexity, accuracy, samples of text, and what a model costs in memory and time.

Every result stands beside the first model's: window by window, question by question, timed in turns.
Read `options.py` first, then `evaluate.py` for quality and `profile.py` for costs.
"""
