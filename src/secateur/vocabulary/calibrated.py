"""Tokenizer and calibration options -> the ranking of its tokens by their use in that text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationOptions
from secateur.data.forms import FORMS
from secateur.data.text import read_calibration
from secateur.data.windows import calibration_texts
from secateur.errors import PlanError
from secateur.vocabulary.pieces import pieces_of
from secateur.vocabulary.ranking import COUNTED, TokenRanking, rank_tokens, token_counts

FORM_WEIGHT = 0.125  # weight of the text in each other form: lower case, spaced punctuation


def rank_by_text(
    tokenizer: PreTrainedTokenizerBase, size: int, options: CalibrationOptions, *, keep: Sequence[str] = ()
) -> TokenRanking:
    """Rank the tokens of a vocabulary of `size` rows by their use in the whole calibration text, in all its forms.

    Sources count by their weights, however long they are. Every token that a text of `keep` uses stays. Raises
    `PlanError` for a tokenizer that cannot be cut and for text that the model writes itself, and `DataError`.
    """
    pieces = pieces_of(tokenizer)
    if options.generated:
        raise PlanError(
            "axes=vocabulary counts tokens in a text, and calibration=self is too little of it: give a text, for "
            "example calibration=FILE"
        )
    counts_V = torch.zeros(size, dtype=torch.float64)
    seen_V = torch.zeros_like(counts_V)  # how often, as the texts are written
    texts = calibration_texts(tokenizer, options, characters=COUNTED)
    lengths = [min(sum(map(len, documents)), COUNTED) for documents in texts]
    for documents, length, (_, weight) in zip(texts, lengths, options.sources, strict=True):
        found_V = token_counts(tokenizer, documents, size)
        seen_V += found_V
        for form in FORMS.values():
            found_V += FORM_WEIGHT * token_counts(tokenizer, map(form, documents), size)
        counts_V += found_V * (weight * max(lengths) / max(length, 1))
    protected_V = torch.zeros(size, dtype=torch.float64)
    for name in keep:
        protected_V += token_counts(tokenizer, read_calibration(name, characters=COUNTED), size)
    # Good and Turing: tokens that do not occur have in all what those have that occur once.
    unseen = float(counts_V[seen_V == 1].sum())
    return rank_tokens(pieces, counts_V, unseen=unseen, protected=protected_V.nonzero().flatten().tolist())
