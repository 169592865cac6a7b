"""What several test files share; no test reaches the hub."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported, so it stands before the imports

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import write_tiny


@pytest.fixture(scope="session")
def demo_model() -> PreTrainedModel:
    """The demo model in float32 on the CPU; shared, so copy it before changing anything."""
    return load("demo", device="cpu")


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a tokenizer; shared, so copy it before changing anything."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")
