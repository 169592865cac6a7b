"""The model: each layer norms its input, and adds what attention and MLP make of it to that norm times a constant.

Tensor names end in their axes: B batch, T token, D hidden, H head, K head size, V vocabulary, X everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_glm_like import GlmLikeConfig


class PlaneRotary(nn.Module):
    """Sines and cosines for one half of a head, looked up by position."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, size, 2) / size))

    def forward(self, ids_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        most = int(ids_BT.max()) + 1  # the table reaches as far as the positions do
        angles_TX = torch.arange(most, device=ids_BT.device)[:, None] * self.inv_freq.float()[None]
        table_TX = torch.cat([angles_TX, angles_TX], dim=-1)
        return tuple(  # type: ignore[return-value]
            functional.embedding(ids_BT, table.to(like.dtype))[:, :, None] for table in (table_TX.cos(), table_TX.sin())
        )


def rotate(x_BTHX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features by their angles."""
    low, high = x_BTHX.chunk(2, dim=-1)
    return x_BTHX * cos + torch.cat([-high, low], dim=-1) * sin


class FusedAttention(nn.Module):
    """Queries, keys and values of a head lie side by side; each half of a head turns with a position of its own."""

    def __init__(self, config: GlmLikeConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_size = config.attention_head_size or config.hidden_size // config.num_attention_heads
        self.coefficient = float(layer + 1)
        width = self.heads * self.head_size
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width)
        self.dense = nn.Linear(width, config.hidden_size)
        self.rotary = PlaneRotary(self.head_size // 2)

    def forward(self, x_BTD: Tensor, places: tuple[Tensor, Tensor], hidden_BXTT: Tensor) -> Tensor:
        mixed = self.query_key_value(x_BTD)
        mixed = mixed.view(*mixed.shape[:2], self.heads, 3 * self.head_size)
        query, key, value = mixed.chunk(3, dim=-1)
        turns = [self.rotary(ids_BT, query) for ids_BT in places]

        def turned(each_BTHK: Tensor) -> Tensor:
            halves = zip(each_BTHK.chunk(2, dim=-1), turns, strict=True)
            return torch.cat([rotate(half, cos, sin) for half, (cos, sin) in halves], dim=-1)

        query, key = turned(query) / (self.coefficient * self.head_size**0.5), turned(key)
        scores = torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
        scores = scores.masked_fill(hidden_BXTT, -10000.0) * self.coefficient
        mixed_BHTK = torch.matmul(scores.softmax(dim=-1), value.permute(0, 2, 1, 3))
        context = mixed_BHTK.permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.shape[:2], self.heads * self.head_size))  # type: ignore[no-any-return]


class WideMlp(nn.Module):
    """Up, a GELU by its tanh approximation, and down."""

    def __init__(self, config: GlmLikeConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = self.dense_h_to_4h(x_BTD)
        x = 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))
        return self.dense_4h_to_h(x)  # type: ignore[no-any-return]


class ScaledBlock(nn.Module):
    """What is carried on is not the input but its norm, times a constant that grows with the depth."""

    def __init__(self, config: GlmLikeConfig, layer: int) -> None:
        super().__init__()
        self.alpha = (2 * config.num_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = FusedAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = WideMlp(config)

    def forward(self, x_BTD: Tensor, places: tuple[Tensor, Tensor], hidden_BXTT: Tensor) -> Tensor:
        normed = self.input_layernorm(x_BTD)
        x_BTD = normed * self.alpha + self.attention(normed, places, hidden_BXTT)
        normed = self.post_attention_layernorm(x_BTD)
        return normed * self.alpha + self.mlp(normed)  # type: ignore[no-any-return]


class GlmLikePreTrainedModel(PreTrainedModel):
    """Where the loader finds the config."""

    config_class = GlmLikeConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["ScaledBlock"]  # noqa: RUF012 - transformers wants a list


class GlmLikeModel(GlmLikePreTrainedModel):
    """Token embeddings, the layers, and a last norm."""

    def __init__(self, config: GlmLikeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ScaledBlock(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens = input_ids.shape[1]
        order_T = torch.arange(tokens, device=input_ids.device)
        hidden_BXTT = (order_T[:, None] < order_T[None, :])[None, None]
        if attention_mask is not None:
            hidden_BXTT = hidden_BXTT | (attention_mask[:, None, None, :] == 0)
        # From the first begin-token on, the text before it keeps one position, and the block counts up.
        block_BT = ((input_ids == self.config.bos_token_id).cumsum(dim=1) > 0).long().cumsum(dim=1)
        places = (order_T[None, :] - block_BT, block_BT)
        x_BTD = self.word_embeddings(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, places, hidden_BXTT)
        return self.final_layernorm(x_BTD)  # type: ignore[no-any-return]


class GlmLikeForCausalLM(GlmLikePreTrainedModel, GenerationMixin):
    """The model with a head of its own over the vocabulary."""

    def __init__(self, config: GlmLikeConfig) -> None:
        super().__init__(config)
        self.transformer = GlmLikeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head  # type: ignore[no-any-return]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> CausalLMOutput:
        """Logits for every token; nothing is cached, whatever `use_cache` says."""
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids, attention_mask)))
