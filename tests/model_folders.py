"""A tiny model of two layers in a folder, and what goes wrong with its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from secateur.errors import ModelError

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
DOWN = "model.layers.1.mlp.down_proj.weight"


def tiny_config(**changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model("llama", **{**SIZES, "pad_token_id": 0, **changes})


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(12).reshape(2, 6)).logits
    return result


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def fails(match: str) -> Any:
    """Expect a `ModelError` of one line whose text contains `match`."""
    return pytest.raises(ModelError, match=rf"^[^\n]*{re.escape(match)}[^\n]*$")
