"""A tiny model of each objective, with a tokenizer that has a mask and tokens around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 40
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
T5 = {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 32, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("bert", BERT),
    "BertForSequenceClassification": ("bert", {**BERT, "num_labels": 3}),
    "BertModel": ("bert", BERT),
    "T5ForConditionalGeneration": ("t5", T5),
    "WhisperForConditionalGeneration": ("whisper", WHISPER),
}


def class_model(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a class, with weights large enough for each to matter."""
    model_type, sizes = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    model: PreTrainedModel = (
        getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    )
    return randomized(model, seed=seed)


def randomized(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough for each to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            around = 1.0 if weight.dim() == 1 else 0.0
            weight.copy_(around + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def class_tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter; a text stands between [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(97, 123)), " ", ".", "\n"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ("pad", "cls", "sep", "mask", "unk")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=letters, **tokens)


def class_folder(folder: Path, architecture: str) -> Path:
    """A folder with the tiny model of a class and its tokenizer."""
    class_model(architecture).save_pretrained(folder)
    class_tokenizer().save_pretrained(folder)
    return folder
