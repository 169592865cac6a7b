"""Configs of small dense models, and a model of one function, for tests of discovery."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, Phi3Config, PreTrainedConfig

from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery

SHARED: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
LAYERS: dict[str, Any] = {**SHARED, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}


def llama(**changes: Any) -> LlamaConfig:
    sizes = {**LAYERS, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
    return LlamaConfig(**sizes | changes)


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama(),
    "gpt2": GPT2Config(**SHARED, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=24),
    "phi3": Phi3Config(**LAYERS, intermediate_size=24, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**LAYERS, intermediate_size=24),
    "opt": OPTConfig(**LAYERS, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
}


@functools.cache
def small_discovery(family: str) -> Discovery:
    """What is found in the model of a config above."""
    return discover(CONFIGS[family])


class Plain(nn.Module):
    """Embedded tokens through one function, which sees the module, then a head."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], columns: int = 6, **children: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(26, 6)
        self.head = nn.Linear(columns, 26, bias=False)
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        return (self.head(self.function(self.embed(input_ids), self)),)


class Block(nn.Module):
    def __init__(self, *, residual: bool = True, blocks: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.residual = residual
        self.inner = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        for block in self.inner:
            y = block(y)
        return x + y if self.residual else y


def in_turn(x: Tensor, module: Any) -> Tensor:
    for block in module.blocks:
        x = block(x)
    return x
