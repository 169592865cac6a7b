"""Models and text -> perplexity, accuracy, size and speed."""
