"""A tokenizer of 97 words with a random model in float64, and a model whose perplexities are computed by hand."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 97


class FixedLogits(PreTrainedModel):
    """Answers `logits` (V) at every position and remembers the shapes of what it read."""

    def __init__(self, logits: Tensor) -> None:
        sizes: dict[str, Any] = {"vocab_size": len(logits)}
        super().__init__(PretrainedConfig(**sizes))
        self.answer = logits
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        self.shapes.append(tuple(input_ids.shape))
        return CausalLMOutput(logits=self.answer.expand(*input_ids.shape, -1))


def word_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        initializer_range=0.5,  # large enough that predictions are far from uniform
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).double().eval()
    return model


def word_ids() -> Tensor:
    return torch.randint(VOCABULARY, (95,), generator=torch.Generator().manual_seed(1))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w96 and an end-of-text token that no model here writes; reads 16 tokens, or so it says."""
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<end>": VOCABULARY}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", model_max_length=16)
