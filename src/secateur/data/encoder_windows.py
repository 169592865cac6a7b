"""Calibration windows -> windows as encoders read them: between special tokens, and some tokens masked."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.errors import DataError
from secateur.models.classes import Objective
from secateur.models.inputs import with_masked

SHARE = 0.15  # of the tokens of each window, as in the training of BERT (Devlin et al. 2018: arXiv 1810.04805)


def as_read(windows_BT: Tensor, tokenizer: PreTrainedTokenizerBase, kind: Objective, *, seed: int = 0) -> Tensor:
    """Windows as a model of this kind is served: an encoder's lie between special tokens, and some of it is masked.

    >>> as_read(torch.arange(5)[None], lambda text, **_: {"input_ids": [*map(ord, text), 9]}, "embedding").tolist()
    [[0, 1, 2, 3, 9]]
    """
    if kind in ("next token", "second half", "transcription"):
        return windows_BT
    windows_BT = between_special_tokens(windows_BT, tokenizer)
    return mask_tokens(windows_BT, tokenizer, seed=seed) if kind == "masked tokens" else windows_BT


def between_special_tokens(windows_BT: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows with the tokens that the tokenizer puts around a text, such as [CLS] and [SEP], in place of their own.

    >>> between_special_tokens(torch.arange(5)[None], lambda text, **_: {"input_ids": [8, *map(ord, text), 9]}).tolist()
    [[8, 1, 2, 3, 9]]
    """
    a, b = (torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in "ab")  # alike but for the text
    before, behind = (int((one != other).to(torch.int8).argmax()) for one, other in ((a, b), (a.flip(0), b.flip(0))))
    framed_BT = windows_BT.clone()
    framed_BT[:, :before] = a[:before]
    framed_BT[:, windows_BT.shape[1] - behind :] = a[len(a) - behind :]
    return framed_BT


def mask_tokens(windows_BT: Tensor, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Tensor:
    """Mask equally many tokens of each window, at places that the seed draws, for a masked language model to predict.

    Special tokens are not masked. Raises `DataError` for a tokenizer without a mask token.

    >>> from secateur.models.inputs import token_ids
    >>> from types import SimpleNamespace
    >>> windows = mask_tokens(torch.arange(20)[None], SimpleNamespace(mask_token_id=99, all_special_ids=[0]))
    >>> int((token_ids(windows) == 99).sum())
    3
    """
    mask_token = tokenizer.mask_token_id
    if not isinstance(mask_token, int):
        raise DataError(
            f"{type(tokenizer).__name__} has no mask token, by which a masked language model is scored: use a score of "
            "weights and no repair, --score l2 --repair none"
        )
    drawn_BT = torch.rand(windows_BT.shape, generator=torch.Generator().manual_seed(seed))
    drawn_BT += torch.isin(windows_BT, torch.tensor(tokenizer.all_special_ids))
    least_BT = drawn_BT.argsort(1).argsort(1)
    return with_masked(windows_BT, least_BT < max(1, round(SHARE * windows_BT.shape[1])), mask_token)
