"""A model folder with three layers and a tokenizer, small enough that every command takes a second."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from secateur.data.text import demo_texts
from secateur.models.silence import quiet

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of what every Python has to read."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator([demo_texts()[0][:40_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of the sizes above, but for the changes; in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{**SIZES, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return model


def write_tiny(
    folder: Path, *, seed: int = 0, shard: str = "1GB", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write such a model with its tokenizer."""
    with quiet():
        tiny_model(seed, dtype=dtype, **changes).save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files and temporary folders too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
