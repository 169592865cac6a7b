"""A tokenizer with a class of its own; as its file says, the mask and the begin-token stand behind what is given."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


class GlmLikeTokenizer(PreTrainedTokenizerFast):
    """As any other."""
