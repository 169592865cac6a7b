"""Checks on the tensors of a model: finite values, and what a packed tensor consists of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import ModelError


def check_finite(model: torch.nn.Module) -> None:
    """Raise `ModelError` if a weight is NaN or Inf, naming the first such tensor and its number of bad values.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.data[0, 1] = float("nan")
    >>> check_finite(layer)
    Traceback (most recent call last):
    secateur.errors.ModelError: weight: 1 of 2 values are NaN or Inf. Expected finite weights; ...
    """
    for name, weight in model.named_parameters():
        if not all_finite(weight):
            bad = weight.numel() - int(torch.isfinite(weight).sum())
            raise ModelError(
                f"{name}: {bad} of {weight.numel()} values are NaN or Inf. Expected finite weights; load the "
                'checkpoint again with dtype="float32" or "bfloat16" (float16 overflows), or download it anew.'
            )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf: by the least and the largest, which is many times faster than asking each.

    >>> all_finite(torch.tensor([1.0, float("nan")])), all_finite(torch.zeros(0))
    (False, True)
    """
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # of float8 torch has no least
    return values.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: a packed one holds numbers and scales, any other only itself.

    >>> [part.shape for part in plain_tensors(torch.zeros(2, 3))]
    [torch.Size([2, 3])]
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    parts, _ = tensor.__tensor_flatten__()
    return [plain for part in parts for plain in plain_tensors(getattr(tensor, part))]
