"""A tokenizer whose tokens are letters."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def letter_tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter, a = 1; asked to, it puts 0 in front."""
    vocabulary = {"^": 0, **{chr(96 + i): i for i in range(1, 27)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="^"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=8)


LETTERS = letter_tokenizer()


def spell(row: list[int]) -> str:
    """The letters of token ids."""
    return "".join(chr(96 + token) for token in row)
