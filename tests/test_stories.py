"""What benchmarks/stories.py reads from llama2.c's files is the model that was written, and its tokenizer's pieces."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stories

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 270}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
POSITIONS = 16


def write_llama2c(model: LlamaForCausalLM, file: Path) -> None:
    """The weights in the file's order; a head's rotated pairs are neighbours there."""
    weights, hidden, heads = model.state_dict(), SIZES["hidden_size"], HEADS["num_attention_heads"]
    parts = [weights["model.embed_tokens.weight"]]
    for name in stories.LAYER:
        for layer in range(SIZES["num_hidden_layers"]):
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = weight.reshape(-1, 2, hidden // heads // 2, hidden).transpose(1, 2)
            parts.append(weight)
    parts += [weights["model.norm.weight"], torch.zeros(2, POSITIONS, hidden // heads // 2)]
    kv, vocabulary = HEADS["num_key_value_heads"], SIZES["vocab_size"]
    header = hidden, SIZES["intermediate_size"], SIZES["num_hidden_layers"], heads, kv, vocabulary, POSITIONS
    numbers = torch.cat([part.flatten() for part in parts])
    file.write_bytes(struct.pack("<7i", *header) + numbers.numpy().tobytes())


@torch.no_grad()
def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    write_llama2c(model, tmp_path / "model.bin")
    found = stories.read_model(tmp_path / "model.bin").eval()
    ids = torch.arange(3, 12)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)
    (tmp_path / "short.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"short\.bin has [\d,]+ weights, its header \(24, 40, 2, 4, 2, 270, 16\) wants"
    ):
        stories.read_model(tmp_path / "short.bin")


def test_the_tokenizer_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    learned = [("a", -1.0), ("b", -2.0), (" ", -3.0), ("ab", -4.0), (" a", -5.0), (" ab", -6.0)]
    pieces = [
        *((name, 0.0) for name in ("<unk>", "\n<s>\n", "\n</s>\n")),
        *((f"<{i}>", 0.0) for i in range(256)),
        *learned,
    ]
    packed = b"".join(struct.pack("<fi", score, len(name)) + name.encode() for name, score in pieces)
    (tmp_path / "tok.bin").write_bytes(struct.pack("<i", 8) + packed)
    tokenizer = stories.read_tokenizer(tmp_path / "tok.bin")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab aé")["input_ids"]) == ["<s>", "▁ab", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("ab aé")["input_ids"], skip_special_tokens=True) == "ab aé"
