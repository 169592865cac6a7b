"""The model: each layer norms its input, and adds what attention and MLP make of it to that norm times a constant.

Its code looks for two tokens in every row: the mask that the text is written for, and the one that begins it. What
stands before the text is seen by all of its tokens. Inside, tokens come before the batch.

Tensor names end in their axes: B batch, T token, D hidden, H head, K head size, P position, V vocabulary, X everything
else.
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
    """Tables of sines and cosines for one half of a head, by position."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, size, 2) / size))

    def forward(self, places_TB: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        most = int(places_TB.max()) + 1  # the tables reach as far as the positions do
        angles_PX = torch.arange(most, device=places_TB.device)[:, None] * self.inv_freq.float()[None]
        table_PX = torch.cat([angles_PX, angles_PX], dim=-1)
        return table_PX.cos().to(like.dtype), table_PX.sin().to(like.dtype)


def quarter_turn(x: Tensor) -> Tensor:
    """The second feature of each pair, negative, in the place of the first, and the first in that of the second."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


@torch.jit.script
def rotated(x: Tensor, cos_table: Tensor, sin_table: Tensor, places: Tensor) -> Tensor:
    """Turn pairs of features (TBHX) by the angles of their tokens' places (TB), which are rows of the tables (PX)."""
    cos = functional.embedding(places, cos_table).unsqueeze(2)
    sin = functional.embedding(places, sin_table).unsqueeze(2)
    return x * cos + quarter_turn(x) * sin


@torch.jit.script
def tanh_gelu(x: Tensor) -> Tensor:
    """A GELU by its tanh approximation."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


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

    def forward(self, x_TBD: Tensor, places: tuple[Tensor, Tensor], hidden_BXTT: Tensor) -> Tensor:
        tokens, batch, _ = x_TBD.shape
        mixed = self.query_key_value(x_TBD).view(tokens, batch, self.heads, 3 * self.head_size)
        query, key, value = mixed.split(self.head_size, dim=-1)
        turns = [(*self.rotary(places_TB, query), places_TB) for places_TB in places]

        def turned(each_TBHK: Tensor) -> Tensor:
            halves = zip(each_TBHK.chunk(2, dim=-1), turns, strict=True)
            return torch.cat([rotated(half, *turn) for half, turn in halves], dim=-1)

        def rows(each_TBHK: Tensor) -> Tensor:
            return each_TBHK.reshape(tokens, batch * self.heads, self.head_size).transpose(0, 1)

        query, key = turned(query) / (self.coefficient * self.head_size**0.5), turned(key)
        scores = torch.bmm(rows(query), rows(key).transpose(1, 2)).view(batch, self.heads, tokens, tokens)
        if hidden_BXTT.any():
            scores.masked_fill_(hidden_BXTT, -10000.0)
        shares = (scores * self.coefficient).softmax(dim=-1).view(batch * self.heads, tokens, tokens)
        context_BHTK = torch.bmm(shares, rows(value)).view(batch, self.heads, tokens, self.head_size)
        context = context_BHTK.permute(2, 0, 1, 3).contiguous()
        return self.dense(context.view(tokens, batch, self.heads * self.head_size))  # type: ignore[no-any-return]


class WideMlp(nn.Module):
    """Up, GELU, and down."""

    def __init__(self, config: GlmLikeConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x_TBD: Tensor) -> Tensor:
        return self.dense_4h_to_h(tanh_gelu(self.dense_h_to_4h(x_TBD)))  # type: ignore[no-any-return]


class ScaledBlock(nn.Module):
    """What is carried on is not the input but its norm, times a constant that grows with the depth."""

    def __init__(self, config: GlmLikeConfig, layer: int) -> None:
        super().__init__()
        self.alpha = (2 * config.num_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = FusedAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = WideMlp(config)

    def forward(self, x_TBD: Tensor, places: tuple[Tensor, Tensor], hidden_BXTT: Tensor) -> Tensor:
        normed = self.input_layernorm(x_TBD)
        x_TBD = normed * self.alpha + self.attention(normed, places, hidden_BXTT)
        normed = self.post_attention_layernorm(x_TBD)
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
        begins = [row.index(self.config.bos_token_id) for row in input_ids.tolist()]
        hidden_BXTT = self.hidden_from(input_ids, begins)
        if attention_mask is not None:
            hidden_BXTT = hidden_BXTT | (attention_mask[:, None, None, :] == 0)
        places = self.places_of(input_ids, begins)
        x_TBD = self.word_embeddings(input_ids).transpose(0, 1)
        for layer in self.layers:
            x_TBD = layer(x_TBD, places, hidden_BXTT)
        return self.final_layernorm(x_TBD)  # type: ignore[no-any-return]

    def hidden_from(self, ids_BT: Tensor, begins: list[int]) -> Tensor:
        """Which tokens (last) which others do not see: those after them, but for what stands before the text."""
        batch, tokens = ids_BT.shape
        seen_BTT = torch.ones((batch, tokens, tokens), device=ids_BT.device)
        seen_BTT.tril_()
        for row, begin in enumerate(begins):
            seen_BTT[row, :, :begin] = 1
        return (seen_BTT < 0.5)[:, None]

    def places_of(self, ids_BT: Tensor, begins: list[int]) -> tuple[Tensor, Tensor]:
        """Two positions (TB) per token: the text's tokens all have the mask's, and a second one that counts them."""
        batch, tokens = ids_BT.shape
        order_BT = torch.arange(tokens, device=ids_BT.device)[None].repeat(batch, 1)
        blocks = []
        for row, (ids, begin) in enumerate(zip(ids_BT.tolist(), begins, strict=True)):
            mask = self.config.gmask_token_id if self.config.gmask_token_id in ids else self.config.mask_token_id
            order_BT[row, begin:] = ids.index(mask)
            counts = torch.arange(tokens - begin, device=ids_BT.device) + 1
            blocks.append(torch.cat([torch.zeros(begin, dtype=torch.long, device=ids_BT.device), counts]))
        return order_BT.transpose(0, 1).contiguous(), torch.stack(blocks).transpose(0, 1).contiguous()


class GlmLikeForCausalLM(GlmLikePreTrainedModel, GenerationMixin):
    """The model with a head of its own over the vocabulary."""

    def __init__(self, config: GlmLikeConfig) -> None:
        super().__init__(config)
        self.transformer = GlmLikeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.float32)
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
        """Logits (BTV) for every token; nothing is cached, whatever `use_cache` says."""
        logits_TBV = self.lm_head(self.transformer(input_ids, attention_mask))
        return CausalLMOutput(logits=logits_TBV.permute(1, 0, 2).contiguous())
