"""A tokenizer with a class of its own, which adds nothing."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


class GlmLikeTokenizer(PreTrainedTokenizerFast):
    """As any other."""
