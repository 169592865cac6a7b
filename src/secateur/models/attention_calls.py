"""A model -> how its code calls attention: engines that bring attention of their own replace what is called here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.models.silence import quiet

RECORDER = "secateur_recorder"  # as which the function that looks is registered
TOKENS = 4  # of the pass in which it looks


@dataclass(frozen=True, slots=True)
class Attention:
    """What one layer's attention was called with."""

    module: str
    heads: int
    kv_heads: int
    head_dim: int


def attention_calls(model: PreTrainedModel, *, flat: bool = False) -> dict[int, Attention]:
    """What the attention of each layer is called with; empty where the model does not call what is registered.

    With `flat`, attention gives tokens x features, as that of vLLM does, which not every model's code can take.

    >>> from secateur.models.loading import skeleton
    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=12)
    >>> attention_calls(skeleton(config))[1]
    Attention(module='model.decoder.layers.1.self_attn', heads=2, kv_heads=2, head_dim=6)
    """
    paths = {module: path for path, module in model.named_modules()}
    calls: dict[int, Attention] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and module in paths:
            calls[number] = Attention(paths[module], query.shape[1], key.shape[1], query.shape[-1])
        out_BTHD = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return (out_BTHD.flatten(2).flatten(0, 1) if flat else out_BTHD), None

    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=model.device)
    with _attention(model, record), torch.no_grad(), quiet():
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception:  # code that does not run like this says nothing of its heads
            return {}
    return calls


@contextmanager
def _attention(model: PreTrainedModel, function: Any) -> Iterator[None]:
    """Let every attention of a model call this function; where configs of modules differ, each of them says so."""
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    configs = {id(owner.config): owner.config for owner in owners if isinstance(owner.config, PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[RECORDER] = function
    try:
        for config in configs.values():
            config._attn_implementation_internal = RECORDER
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        del ALL_ATTENTION_FUNCTIONS[RECORDER]
