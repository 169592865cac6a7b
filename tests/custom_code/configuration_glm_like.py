"""The sizes of the model beside this file."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class GlmLikeConfig(PreTrainedConfig):
    """Names are the model's own; `attention_head_size` None means that the heads share the hidden width."""

    model_type = "glm_like"

    def __init__(
        self,
        hidden_size: int = 48,
        num_attention_heads: int = 6,
        attention_head_size: int | None = None,
        inner_hidden_size: int = 192,
        num_layers: int = 3,
        vocab_size: int = 303,
        mask_token_id: int = 302,
        gmask_token_id: int = 300,
        max_sequence_length: int = 256,
        layernorm_epsilon: float = 1e-5,
        **others: Any,
    ) -> None:
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4")
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = attention_head_size
        self.inner_hidden_size = inner_hidden_size
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = False
        super().__init__(**{"tie_word_embeddings": False, **others})
