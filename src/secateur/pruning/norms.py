"""A norm over a hidden width that is cut -> its weight, scaled so that its outputs come nearest to what they were.

A norm takes its statistic over all features. Over fewer of them it is another number, which changes the size of all
outputs. Names of tensors end in their axes: D hidden, B batch, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from secateur.discovery.algebra import variables_in
from secateur.discovery.groups import Discovery


def norms_over(model: PreTrainedModel, discovery: Discovery, groups: Collection[str]) -> dict[str, str]:
    """Path of each norm over one of these groups -> the group: modules with a weight for each unit, and no matrix."""
    norms = {}
    for weight in discovery.weights:
        path, _, last = weight.name.rpartition(".")
        names = [variable.name for variable in variables_in(weight.dims[0])] if len(weight.dims) == 1 else []
        if last == "weight" and weight.parameter and len(names) == 1 and names[0] in groups:
            module = model.get_submodule(path)
            group = discovery.group(names[0])
            if group.normed and group.units == weight.shape[0] and not any(p.dim() > 1 for p in module.parameters()):
                norms[path] = group.name
    return norms


def narrowed(norm: nn.Module, kept: Tensor) -> Any:
    """A copy of the norm over some of its features."""
    smaller: Any = copy.deepcopy(norm)
    smaller._forward_hooks.clear()
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(smaller, name, nn.Parameter(parameter.detach()[kept], requires_grad=False))
    if isinstance(getattr(norm, "normalized_shape", None), tuple):
        smaller.normalized_shape = (len(kept),)
    return smaller


def scaled_weight(smaller: Any, wanted_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The weight with which the narrowed norm comes nearest to the outputs wanted; None where no weight scales it.

    The norm's own arguments come after: its inputs, and for some a gate. Some norms multiply by their weight, some by
    one more than it.
    """
    weight_D = smaller.weight.detach()
    bias = getattr(smaller, "bias", None)
    bias_D = torch.zeros_like(weight_D) if bias is None else bias.detach()
    before_BTD, target_BTD = (smaller(*args, **kwargs) - bias_D).double(), (wanted_BTD - bias_D).double()
    scale = float((before_BTD * target_BTD).sum() / before_BTD.square().sum().clamp_min(1e-30))
    expected_BTD = before_BTD[:1] * scale
    near = 1e-2 * float(expected_BTD.abs().max())
    candidates: tuple[Tensor, ...] = (weight_D * scale, (weight_D + 1) * scale - 1)
    first_args, first_kwargs = pytree.tree_map_only(Tensor, lambda each: each[:1], (args, kwargs))
    for scaled_D in candidates:
        smaller.weight = nn.Parameter(scaled_D)
        scaled_BTD = smaller(*first_args, **first_kwargs) - bias_D
        if torch.allclose(scaled_BTD.double(), expected_BTD, rtol=1e-2, atol=near):
            return scaled_D
    return None
