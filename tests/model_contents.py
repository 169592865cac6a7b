"""What a stock model is made of, but for the numbers in its tensors: models alike in it run the same operators."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from secateur.models.inputs import INPUTS

STOCK = ("torch.nn.", "transformers.")  # modules whose code no test changes
MODULES_OWN = {*vars(nn.Module())}  # what every module holds


def content_of(model: nn.Module) -> str | None:
    """A digest of all modules: class, config, numbers and the shapes of tensors; None where more than these counts.

    >>> content_of(nn.Linear(2, 3)) == content_of(nn.Linear(2, 3)) != content_of(nn.Linear(3, 3))
    True
    """
    if INPUTS:
        return None
    digest = sha256()
    configs: dict[int, str] = {}
    names: dict[int, str] = {}  # of tensors, by which tied ones are told
    for path, module in model.named_modules():
        if not type(module).__module__.startswith(STOCK) or module._forward_hooks or module._forward_pre_hooks:
            return None
        parts: list[Any] = [path, type(module).__module__, type(module).__qualname__, module.training]
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                if id(value) not in configs:
                    configs[id(value)] = value.to_json_string(use_diff=False)
                parts += [name, configs[id(value)]]
            elif name not in MODULES_OWN:
                parts += [name, value]  # what has its address in its text is like nothing else
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                parts += [name, tuple(tensor.shape), tensor.dtype, names.setdefault(id(tensor), f"{path}.{name}")]
        digest.update(repr(parts).encode())
    return digest.hexdigest()
